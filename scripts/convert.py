"""Reads a published draft head into a run folder: EAGLE, EAGLE-3, Medusa, MSD and ViSpec, in their own layouts.

    python scripts/convert.py DOWNLOADED --target llava-hf/llava-1.5-7b-hf --out runs/eagle_public
    python -m eval.mmspec --ckpt runs/eagle_public --limit 60

The files are safetensors with their config.json. Names, shapes and settings are translated or refused, each in one
line; frozen copies of the target's embeddings are compared with the target and left out. `--layout` says which head it
is where names do not: MSD's are EAGLE's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mmspec.api import find_device
from mmspec.arguments import Parser, command
from mmspec.convert import LAYOUTS, convert
from mmspec.hub import fetch, origin, place_of
from mmspec.targets import load_target
from mmspec.types import InputError


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: it is wrong.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("head", metavar="DIR", help="the published head: a folder, its safetensors file, or hub:org/name[@revision]")
    add("--layout", default="auto", choices=("auto", *LAYOUTS), help="default: by the names of the tensors")
    add("--target", required=True, metavar="NAME", help="the target it was made for: a folder, hub id or tiny_llava")
    add("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    add("--taps", type=int, nargs=3, default=(), metavar="L", help="EAGLE-3: hidden states it reads, if not as it says")
    add("--image-input", metavar="HOW", help="what it saw of images in training: none, aux, embeds or compressed")
    add("--dtype", default="float32", help="of the target while it is compared (default float32)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"--out {args.out} is there already; name a new folder")
    return args


@command("convert")
def main(argv: Sequence[str] | None = None) -> None:
    """Reads, checks and writes."""
    args = arguments(argv)
    target = load_target(args.target, args.dtype, find_device(args.device))
    hub = place_of(args.head)
    place = fetch(hub) if hub else Path(args.head)
    named = origin(hub, place) if hub else None
    # Whole or not at all: what an interrupted conversion left would be refused from then on.
    out = args.out.resolve()
    scratch = out.with_name(f".{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        made = convert(place, args.layout, target, scratch, args.taps, args.image_input, named)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{made.kind} head for {Path(target.name).name}: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
