#!/usr/bin/env bash
# All methods of MMSpec and ViSkip side by side: at one budget of draft nodes, and each at what was tuned for it.
#   bash scripts/compare_methods.sh --heads eagle=DIR eagle3=DIR medusa=DIR msd=DIR vispec=DIR viskip=DIR [--help]
# Every step resumes or is skipped when it is done: run it again after an interruption.
set -euo pipefail
. "$(dirname "$0")/env.sh"
mmspec_environment
exec python -m scripts.compare_methods "$@"
