"""Writes a trained head in the layout that a serving engine reads.

    python scripts/export.py runs/eagle3_qwen2_5_vl_7b --format sglang --out served/sglang --verify
    python scripts/export.py runs/eagle3_qwen2_5_vl_7b --format speculators --out served/vllm --dtype bfloat16
    python scripts/export.py runs/medusa_llava7b --format vllm-medusa --out served/medusa

Formats:

    sglang        EAGLE-3 head as its authors and SGLang lay it out (midlayer.*, d2t, t2d); vLLM reads it as well
    speculators   EAGLE-3 head as the speculators package lays it out for vLLM, with the target's embeddings
    vllm-medusa   Medusa heads for vLLM

What an engine would draft otherwise than the head was trained is refused: other kinds of heads (EAGLE, MSD, ViSpec),
image_input embeds, none and compressed (train with head.image_input=aux), three rotary axes for a target without them,
a ViSkip controller unless --head-only leaves it behind. A target for which the engine has no hook, as LLaVA-1.5, is a
warning. The folder appears when it is complete: config.json, model.safetensors, and NOTES.md with the command that
serves it and all warnings.

--verify reads the files back by a plain computation and by the converter, and compares draft logits for random states
(fp32, 1e-4); a speculators folder also with the `speculators` package, of this Python or of the one that
MMSPEC_SPECULATORS_PYTHON names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmspec.api import find_device
from mmspec.arguments import Parser
from mmspec.assets import resolve
from mmspec.checkpoint import Checkpoint, write_json
from mmspec.export import plain
from mmspec.export.engines import ENGINES
from mmspec.export.run import DTYPES, Verifier, export
from mmspec.export.verify import Check, Mismatch, S, T, compared, head_logits, make_sample, spread
from mmspec.types import InputError, Target

SPECULATORS = "MMSPEC_SPECULATORS_PYTHON"
"""Environment variable: a Python that has the speculators package."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """
    Raises:
        InputError: a wrong command line.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of train/distill.py or scripts/convert.py")
    add("--format", required=True, choices=list(ENGINES), help="see above")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--target", metavar="NAME", help="another place of the run's target: a folder, hub id or tiny_llava")
    add("--verifier", metavar="NAME", help="the name by which the engine finds the target (default: as --target)")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are saved)")
    add("--device", default="auto", help="of the target, where its weights are needed: cpu, cuda, ... (default: auto)")
    add("--verify", action="store_true", help="read the result back and compare draft logits, before it is there")
    add("--force", action="store_true", help="replace an earlier export")
    add("--head-only", action="store_true", help="leave the run's ViSkip controller behind, which no engine runs")
    add(
        "--merged-images",
        action="store_true",
        help="sglang: yours hands its draft the merged image embeddings (mm_input_embeds in its llama_eagle3.py), so "
        "that a head with image_input embeds is right and one with aux is not",
    )
    return parser.parse_args(argv)


def ways(format: str) -> list[Verifier]:
    """How to read the result back besides with our own code: by the package that a layout is named after."""
    python = os.environ.get(SPECULATORS) or (sys.executable if importlib.util.find_spec("speculators") else None)
    if format != "speculators" or python is None:
        return []

    def way(folder: Path, made: Checkpoint, target: Target, dtype: torch.dtype) -> list[Check]:
        check = by_speculators(python, folder, made, target, dtype)[0]
        check.require()
        return [check]

    return [way]


def by_speculators(
    python: str, folder: Path, made: Checkpoint, target: Target, dtype: torch.dtype
) -> tuple[Check, dict[str, Any]]:
    """Drafts by the speculators package, from the exported folder alone.

    Args:
        python: has the package.
        folder, made, target, dtype: see `mmspec.export.verify.verify`.

    Returns:
        The comparison of all logits of the prefix and of two chained draft steps; what the package says of the folder.

    Raises:
        Mismatch: it cannot load the folder.
    """
    sample, place = make_sample(made, target, dtype), Path(resolve(target.name))
    head: Any = made.head().to(dtype).float()
    ours = head_logits(head, sample, torch.empty(0))
    settings = plain.read(folder).settings
    ids = plain.layer_ids(settings, made.target.shape.n_layers)
    # The package loads the verifier too: from where it is here, whatever the engine will call it.
    verifier = settings["speculators_config"]["verifier"]
    verifier["name_or_path"] = str(place.absolute()) if place.is_dir() else target.name
    hidden = torch.cat([sample.hidden[i] for i in ids], -1).unsqueeze(0)
    with tempfile.TemporaryDirectory() as there:
        given, out = str(Path(there) / "inputs.safetensors"), str(Path(there) / "out.safetensors")
        save_file({"hidden": hidden, "input_ids": sample.ids.unsqueeze(0)}, given)
        head_there = Path(there) / "head"
        head_there.mkdir()
        (head_there / "model.safetensors").symlink_to((folder / "model.safetensors").absolute())
        write_json(head_there / "config.json", settings)
        words = [python, "-I", Path(__file__).with_name("_speculators.py"), head_there, given, out]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Mismatch(f"speculators cannot load the exported folder: {last}")
        drafted = load_file(out)
        with safe_open(out, framework="pt") as file:
            said: dict[str, Any] = json.loads(file.metadata()["said"])
    logits = drafted["logits"]
    # Drafts behind the last pair of the prefix: later steps from the same place.
    theirs = torch.cat([logits[0, :T], *(logits[step, T - 1 : T] for step in range(1, S + 1))])
    if "d2t" in drafted:
        theirs = spread(theirs, torch.arange(theirs.shape[-1]) + drafted["d2t"], made.config.vocab_size)
    return compared(f"drafted by speculators {said['version']}", ours, theirs), said


def main(argv: Sequence[str] | None = None) -> int:
    """Exports.

    Returns:
        0; 2 for wrong input; 1 where the verification failed.
    """
    try:
        args = arguments(argv)
        done = export(
            args.run,
            args.format,
            args.out,
            args.target,
            args.verifier,
            args.dtype,
            find_device(args.device),
            ways(args.format) if args.verify else None,
            args.force,
            args.head_only,
            args.merged_images,
        )
    except (InputError, Mismatch) as error:
        print(f"export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    for note in done.notes:
        print(f"export: warning: {note}", file=sys.stderr)
    for check in done.checks:
        print(f"verified, {check}")
    if args.verify and args.format == "speculators" and len(done.checks) == 2:
        print(f"not drafted by speculators, which is not installed here: set {SPECULATORS} to a Python that has it")
    print(f"{done.made.kind} head for {ENGINES[args.format].name}: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
