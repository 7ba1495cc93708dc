#!/usr/bin/env bash
# Format check, lint, types and tests, in the project's own environment (made when absent).
#   bash scripts/test.sh [--all] [pytest arguments]
# Without --all the tests marked `slow` are left out; tests marked `gpu` run where there is one.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;; esac
. "$(dirname "$0")/env.sh"
mmspec_environment

marks="not slow"
if [ "${1:-}" = --all ]; then
    marks=""
    shift
fi
python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || marks="${marks:+$marks and }not gpu"
echo "== format" && ruff format --check .
echo "== lint" && ruff check .
echo "== types" && mypy -n 2
echo "== tests" && python -m pytest -q -n 2 --dist worksteal -m "$marks" "$@"
