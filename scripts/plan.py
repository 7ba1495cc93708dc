"""Plans a training run before anything is loaded: what a recipe needs, and with which settings it fits your devices.

    python scripts/plan.py recipes/eagle3_llava7b.yaml --gpus 8 --gpu-gb 80
    python scripts/plan.py recipes/eagle3_llava7b.yaml --gpu-gb 24 --tflops 165 --memory-gb-s 1000
    python scripts/plan.py recipes/viskip_llava7b.yaml optim.micro_batch=4 --gpus 4 --gpu-gb 40 --json plan.json

No weights, data, network or GPU are needed: shapes come from the target's config.json where target.name is a folder,
else from mmspec/assets/shapes.json. Memory is that of the fullest moment, with conversations as long as data.max_length
lets them be; time and disk are those of an average conversation (--tokens, --answers). The table has the recipe as it
is and other ways to train the same on the same global batch: micro-batches, ZeRO stages, what lives in the host's
memory, where the target is, narrower floats or quantised weights (marked *: they change the numbers of training).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from mmspec.arguments import Parser, add_recipe, command  # noqa: E402
from mmspec.recipe import Recipe, load  # noqa: E402
from mmspec.types import InputError  # noqa: E402
from train import fits, memory  # noqa: E402
from train.estimate import (  # noqa: E402
    GIB,
    Assumed,
    Sizes,
    answer_seconds,
    run_folder,
    sizes,
    store_bytes,
    summary,
    work,
)


@command("plan")
def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, 1 when nothing fits, or 2 for wrong input."""
    arguments = _parse(argv)
    recipe = load(arguments.recipe, arguments.overrides)
    assumed = Assumed(**{item.name: getattr(arguments, item.name) for item in dataclasses.fields(Assumed)})
    sized = sizes(recipe)
    found = None
    if arguments.gpu_gb is not None:
        limit = fits.usable(arguments.gpu_gb, arguments.reserve_gb)
        found = fits.search(recipe, sized, arguments.gpus, limit, assumed, arguments.global_batch)
    recipe = fits.scaled(recipe, arguments.gpus, arguments.global_batch)
    plan = figures(recipe, sized, arguments.gpus, assumed)
    # On a terminal rich wraps by its width; a file or a pipe gets whole lines.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(summary(recipe, sized, arguments.gpus, assumed), markup=False, soft_wrap=True)
    best: list[fits.Setting] = []
    if found is not None:
        best = fits.recommended(*found)
        _show(console, found[0], fits.shortlist(*found), best, arguments)
        plan["fits"] = found[0].fits
        plan["recommended"] = [_entry(setting) for setting in best]
        plan["settings"] = [_entry(setting) for setting in fits.shortlist(*found)]
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--json {arguments.json} cannot be written ({error.strerror})") from error
    return 1 if found is not None and not best else 0


def figures(recipe: Recipe, sized: Sizes, processes: int, assumed: Assumed) -> dict[str, Any]:
    """What `--json` writes: bytes, operations and seconds by name."""
    held = memory.count(recipe, sized.target, sized.head, memory.worst(recipe, sized.target), processes, decoding=True)
    step = work(recipe, sized, processes, assumed)
    return {
        "processes": processes,
        "parameters": {
            "target": sized.target.n_parameters,
            "head": sized.head.n,
            "controller": sized.n_controller,
        },
        "memory": {"peak": held.peak, "fullest": held.fullest, "moments": held.moments, "host": held.host},
        "run_folder": dict(run_folder(recipe, sized)),
        "features_per_1000": {kind: store_bytes(recipe, sized, kind, assumed) for kind in ("bfloat16", "float8")},
        "step": {**dataclasses.asdict(step), "flops": step.flops, "seconds": step.seconds},
        "hours": {
            "training": step.seconds * recipe.run.max_steps / 3600,
            "answers": answer_seconds(recipe, sized, processes, assumed) / 3600,
        },
        "assumed": dataclasses.asdict(assumed),
    }


def _entry(setting: fits.Setting) -> dict[str, Any]:
    return {**dataclasses.asdict(setting), "overrides": setting.overrides}


def _show(
    console: Console, mine: fits.Setting, listed: list[fits.Setting], best: list[fits.Setting], args: argparse.Namespace
) -> None:
    """The table, and the line to paste."""
    console.print()
    table = Table(
        title=f"{args.gpus} x {args.gpu_gb:g} GB, of which {args.reserve_gb:g} are left to libraries",
        box=box.SIMPLE_HEAD,
    )
    for name in ("fits", "GiB", "on host", "time"):
        table.add_column(name, justify="right")
    table.add_column("settings", overflow="fold")
    for setting in listed:
        words = setting.overrides if setting.changes else "(the recipe as it is)"
        table.add_row(
            "[green]yes[/]" if setting.fits else "[red]no[/]",
            f"{setting.bytes / GIB:.1f}",
            f"{setting.host / GIB:.1f}" if setting.host else "",
            f"{setting.seconds / mine.seconds:.2f}x",
            ("" if setting.same else "* ") + words,
        )
    console.print(table)
    if not best:
        console.print("[red]nothing fits[/]: a shorter data.max_length, a smaller target, or devices of more memory")
    for setting in best:
        kind = "recommended" if setting.same else "faster, but with other numbers" if len(best) > 1 else "recommended*"
        console.print(f"{kind}: {setting.overrides or '(the recipe as it is)'}", markup=False, soft_wrap=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="scripts/plan.py",
        description=__doc__,
        epilog="exit codes: 0 a plan, 1 nothing fits --gpu-gb, 2 wrong input",
    )
    add, usual = parser.add_argument, Assumed()
    add_recipe(parser)
    add("--gpus", type=int, default=1, help="processes, one a device (default 1)")
    add("--gpu-gb", type=float, metavar="G", help="memory of a device in GiB: look for settings that fit")
    add("--reserve-gb", type=float, default=1.5, metavar="G",
        help="GiB of it left to the CUDA context, workspaces and fragmentation (default %(default)s)")  # fmt: skip
    add("--global-batch", type=int, default=0, metavar="N",
        help="conversations of an optimizer step (default: gpus x micro_batch x accumulate of the recipe)")  # fmt: skip
    add("--tokens", type=int, default=usual.tokens, help="of an average conversation (default: half of the longest)")
    add("--answers", type=float, default=usual.answers, metavar="SHARE",
        help="share of its tokens that are answers (default %(default)s)")  # fmt: skip
    add(
        "--tflops", type=float, default=usual.tflops, help="10^12 operations a second of a device (default %(default)g)"
    )
    add("--utilisation", type=float, default=usual.utilisation, help="share that is reached (default %(default)s)")
    add("--memory-gb-s", type=float, default=usual.memory_gb_s, help="of a device's own memory (default %(default)g)")
    add("--link-gb-s", type=float, default=usual.link_gb_s, help="between devices (default %(default)g)")
    add("--host-gb-s", type=float, default=usual.host_gb_s, help="from and to the host (default %(default)g)")
    add("--host-adam", type=float, default=usual.host_adam, metavar="N",
        help="parameters a second that the host updates (default %(default)g)")  # fmt: skip
    add("--json", type=Path, metavar="OUT", help="write the figures there")
    args = parser.parse_intermixed_args(argv)
    for name in ("gpus", "tflops", "utilisation", "memory_gb_s", "link_gb_s", "host_gb_s", "host_adam", "answers"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be greater than 0, got {getattr(args, name)}")
    for name in ("utilisation", "answers"):
        if getattr(args, name) > 1:
            raise InputError(f"--{name} is a share, at most 1, got {getattr(args, name)}")
    for name in ("tokens", "global_batch", "reserve_gb"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(args, name)}")
    if args.gpu_gb is not None and args.gpu_gb <= args.reserve_gb:
        raise InputError(f"--gpu-gb must be more than --reserve-gb={args.reserve_gb:g}, got {args.gpu_gb:g}")
    return args


if __name__ == "__main__":
    sys.exit(main())
