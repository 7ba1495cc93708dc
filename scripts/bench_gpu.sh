#!/usr/bin/env bash
# Measures everything that needs one GPU: targets of full size, training, and a trained target of middle size.
#   bash scripts/bench_gpu.sh [--here] [--help | options of scripts/bench_gpu.py]
# At most --minutes a call; the same command goes on. --here: the Python at hand instead of .venv, where no package can be
# fetched; it needs torch, transformers, omegaconf, einops, rich, tqdm, datasets, peft, psutil, jinja2; no deepspeed.
set -euo pipefail
. "$(dirname "$0")/env.sh"
case " $* " in *" --here "*) ;; *) mmspec_environment ;; esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python3 scripts/bench_gpu.py "$@"
