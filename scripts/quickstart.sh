#!/usr/bin/env bash
# The main job, end to end, on the embedded tiny target: no download beyond packages, no GPU, no account.
#   bash scripts/quickstart.sh [key=value ...]      recipe overrides, e.g. run.max_steps=50
# Steps: environment -> the target answers -> head and ViSkip controller are distilled -> scored on synth:testmini.
# Every step resumes or is skipped when it is done: run it again after an interruption.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;; esac
. "$(dirname "$0")/env.sh"
mmspec_environment

recipe=recipes/viskip_tiny.yaml
run=runs/viskip_tiny
for override in "$@"; do case $override in run.name=*) run=runs/${override#run.name=} ;; esac; done

if [ -f "$run/viskip.safetensors" ] && [ -f "$run/eval/summary.json" ] && [ $# -eq 0 ]; then
    echo "== done already: $run (remove it to start anew)"
    python -m eval.show "$run/eval/summary.json"
    exit 0
fi
echo "== 1/3 the target answers the training prompts"
python scripts/regenerate.py "$recipe" --procs 2 "$@"
echo "== 2/3 distill the draft head and the ViSkip controller"
deepspeed --num_gpus 2 train/distill.py "$recipe" run.resume=true "$@"
echo "== 3/3 score plain decoding, the head, and ViSkip"
python -m eval.mmspec --ckpt "$run" --data synth:testmini --out "$run/eval"
