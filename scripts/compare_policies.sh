#!/usr/bin/env bash
# Trains controllers, tunes and scores all policies (P0 to P9 and the marginal rule) of several drafters, and writes the table.
#   bash scripts/compare_policies.sh [--help | options of scripts/compare_policies.py]
# Every step resumes or is skipped when it is done: run it again after an interruption.
set -euo pipefail
. "$(dirname "$0")/env.sh"
mmspec_environment
exec python -m scripts.compare_policies "$@"
