#!/usr/bin/env bash
# Trains every head of the tiny target and its vision-blind twin on one budget, and writes the tables and plots.
#   bash scripts/compare_heads.sh [--help | options of scripts/compare_heads.py]
# Every step resumes or is skipped when it is done: run it again after an interruption.
set -euo pipefail
. "$(dirname "$0")/env.sh"
mmspec_environment
exec python -m scripts.compare_heads "$@"
