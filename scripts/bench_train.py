"""Measures one EAGLE-3 training step on a CPU against a plain one, and against a peer's, as ratios within one run.

    python scripts/bench_train.py --json OUT [--peer speculators [--peer-env DIR]]

A step is forward, backward and AdamW on given features of a frozen target, in fp32. Every side runs in a process of its
own; the sides take turns. What is printed and written (medians; the names are the JSON keys):

  tokens_per_s_vs_reference     tokens/s of this project / tokens/s of the reference in this file: the paper's step
                                written out, padded, with all logits and all scores; 40% of the tokens are answers
  peak_memory_vs_reference      peak bytes of a step (resident at most, less resident before it), the same two
  loss_vs_reference             largest relative difference of their losses, which start from the same weights
  tokens_per_s_vs_speculators   the same against `Eagle3DraftModel` of speculators 0.9, as it runs on a CPU (eager
  peak_memory_vs_speculators    attention and loss); one packed row, half of whose tokens are answers. It keeps its
                                unembedding frozen, which is trained here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _bench import interleaved, publish, ratio
from _sides import Side, optimised, serve
from torch import Tensor
from tqdm import tqdm

from mmspec import checkpoint as checkpoints
from mmspec.arguments import Parser, at_least, command
from mmspec.heads import eagle3
from mmspec.losses import LossConfig
from mmspec.types import Features, InputError

SCRIPTS = Path(__file__).parent
PEER = ("torch==2.13.0", "speculators==0.9.*")
"""What `--peer speculators` installs; the same torch as here."""
DECAY = 0.8


# ---- the sides, each in its own process ----


def given(settings: Mapping[str, Any]) -> Features:
    """Random features of right-padded rows; the last tokens of each conversation are its answer.

    Args:
        settings: rows (lengths of the conversations of each), answers (their share), hidden.
    """
    rows = settings["rows"]
    shape = len(rows), max(map(sum, rows))
    segment, answer = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    for row, lengths in enumerate(rows):
        at = 0
        for number, n in enumerate(lengths, 1):
            segment[row, at : at + n] = number
            answer[row, at + n - round(settings["answers"] * n) : at + n] = 1
            at += n
    states = [torch.randn(*shape, settings["hidden"]) for _ in range(5)]
    none = torch.zeros(shape, dtype=torch.bool)
    hidden = dict(enumerate(states[2:]))
    return Features(segment, segment > 0, answer, none, states[0], states[1], hidden, segment=segment)


def run_side(name: str, settings: Mapping[str, Any]) -> None:
    """Serves steps of `ours` or of the `reference`; both begin with the same weights and features."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    features, width, heads = given(settings), settings["hidden"], settings["heads"]
    frozen = torch.randn(settings["vocab"], width) * width**-0.5
    sizes = {"hidden_size": width, "intermediate_size": settings["inner"], "head_dim": width // heads}
    sizes |= {"n_heads": heads, "n_kv_heads": heads}
    sizes |= {"vocab_size": settings["vocab"], "draft_vocab_size": settings["vocab"]}
    config = eagle3.Config(**sizes, taps=(0, 1, 2), rms_eps=1e-5)
    head = eagle3.Head(config, LossConfig(steps=settings["steps"], step_decay=DECAY))

    def ours() -> Tensor:
        objective = head(features, lambda states: states @ frozen.T)
        return objective.loss / objective.count

    loss = ours if name == "ours" else lambda: plain_loss(head, features, frozen, settings["steps"])
    serve(optimised(list(head.parameters()), loss))


class PlainAttention:
    """Training-time test with all scores [T, T + s] of each step, and a mask as large."""

    def __init__(self, valid: Tensor) -> None:
        T = valid.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril() & valid.unsqueeze(1)
        self.mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min).unsqueeze(1)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        T, own = q.shape[2], [(q * key).sum(-1, keepdim=True) for key in self.keys[1:]]
        scores = torch.cat([q @ self.keys[0].transpose(-1, -2), *own], -1) * q.shape[-1] ** -0.5
        mask = torch.cat([self.mask, self.mask.new_zeros(*self.mask.shape[:3], len(own))], -1)
        weights = (scores + mask).softmax(-1)
        out = weights[..., :T] @ self.values[0]
        for step, value in enumerate(self.values[1:]):
            out = out + weights[..., T + step, None] * value
        return out


def plain_loss(head: eagle3.Head, features: Features, frozen: Tensor, steps: int) -> Tensor:
    """The mean loss as EAGLE-3's paper writes it down: every step at every position of the padded batch, all logits.

    Weights are those of `head`, and so is the arithmetic of its parts.
    """
    n, T = features.input_ids.shape[1] - 2, features.input_ids.shape[1]
    with torch.no_grad():
        truth = (features.last_hidden @ frozen.T).softmax(-1)
    index, reply = torch.arange(n), features.answer[:, 1 : n + 1]
    attention, states = PlainAttention(features.valid[:, :n]), head.enter(head.read(features)[:, :n])
    total, right, same = torch.zeros(()), torch.ones_like(reply, dtype=torch.bool), reply > 0
    count = torch.zeros(())
    for step in range(steps):
        shifted = features.embeds[:, (index + 1 + step).clamp_max(T - 1)]
        rope = head.rotary.at((index + step).unsqueeze(0), T + steps, states.dtype)
        states = head.block(head.pair(shifted, states), rope, attention)
        logits = head.lm_head(head.norm(states))
        ahead = index + 2 + step
        same = same & (ahead < T) & (features.answer[:, ahead.clamp_max(T - 1)] == reply)
        p = truth[:, (ahead - 1).clamp_max(T - 1)]
        total = total - DECAY**step * ((p * logits.log_softmax(-1)).sum(-1) * same).sum()
        right = right & (logits.argmax(-1) == p.argmax(-1))
        count = same.sum() if step == 0 else count
    return total / count


# ---- the comparison ----


class Bench:
    """Measures sides in turn.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bar = tqdm(unit="turn", desc="bench_train", disable=not sys.stderr.isatty())
        names = ("hidden", "inner", "heads", "vocab", "steps", "threads")
        self.shape = {name: getattr(args, name) for name in names}

    def compare(self, other: str, command: list[Path | str], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Figures of this project's step against another side's."""
        settings = {**self.shape, **settings}
        sides = [Side("ours", [sys.executable, __file__, "--side", "ours"], settings), Side(other, command, settings)]
        try:
            mine, theirs = interleaved([side.step for side in sides], self.args.repeats, self.bar.update)
        finally:
            for side in sides:
                side.close()
        tokens = sum(map(sum, settings["rows"]))
        figures: dict[str, Any] = {
            f"tokens_per_s_vs_{other}": ratio(theirs, mine),
            f"peak_memory_vs_{other}": sides[0].peak_bytes / sides[1].peak_bytes,
        }
        if other == "reference":
            pairs = zip(*([answer["said"] for answer in side.answers] for side in sides))
            figures["loss_vs_reference"] = max(abs(a / b - 1) for a, b in pairs)
        figures[f"against_{other}"] = {
            side.name: {"seconds": seconds, "tokens_per_s": tokens / sorted(seconds)[len(seconds) // 2]}
            | {"peak_gb": side.peak_bytes / 1e9}
            for side, seconds in zip(sides, (mine, theirs))
        } | {"rows": settings["rows"], "answers": settings["answers"]}
        return figures

    def against_reference(self) -> dict[str, Any]:
        """A padded batch of conversations of mixed lengths."""
        rows = [[n] for n in lengths(self.args.length, self.args.conversations)]
        command: list[Path | str] = [sys.executable, __file__, "--side", "reference"]
        return self.compare("reference", command, {"rows": rows, "answers": 0.4})

    def against_speculators(self) -> dict[str, Any]:
        """One row of `length` tokens, filled with conversations."""
        row: list[int] = []
        for n in lengths(self.args.length, 8):
            row += [min(n, self.args.length - sum(row))] * (sum(row) < self.args.length)
        with peer_python(self.args.peer_env) as python:
            command = [python, SCRIPTS / "_train_peer.py"]
            return self.compare("speculators", command, {"rows": [row], "answers": 0.5})


def lengths(longest: int, n: int) -> list[int]:
    """Mixed lengths, from an eighth of the longest on."""
    return [int(x) for x in torch.randint(longest // 8, longest + 1, (n,), generator=torch.Generator().manual_seed(0))]


@contextlib.contextmanager
def peer_python(folder: Path | None) -> Iterator[Path]:
    """The interpreter of the peer's own environment, which is made where it is not there yet.

    Raises:
        InputError: it cannot be installed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        python = place / "bin" / "python"
        if not python.is_file():
            print(f"bench_train: installing {' '.join(PEER)} in {place}", file=sys.stderr)
            venv.create(place, with_pip=True)
            _pip(python, "install", *PEER)
            # transformers does without them, but cannot be imported beside ones that were built for another torch.
            _pip(python, "uninstall", "--yes", "torchvision", "torchaudio")
        yield python


def _pip(python: Path, *words: str) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", words[0], "--quiet", *words[1:]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"--peer speculators: pip {' '.join(words)} failed: {last}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="OUT", help="write the figures there")
    add("--peer", choices=("speculators",), help="compare with this project as well; it is installed apart")
    add("--peer-env", type=Path, metavar="DIR", help="keep the peer's environment there (default: a temporary one)")
    add("--repeats", type=int, default=3, help="of each comparison (default %(default)s)")
    add("--threads", type=int, default=2, help="of torch (default %(default)s)")
    add("--conversations", type=int, default=4, help="in the batch against the reference (default %(default)s)")
    add("--length", type=int, default=1024, help="of the longest conversation, in tokens (default %(default)s)")
    add("--steps", type=int, default=7, help="unrolled draft steps (default %(default)s)")
    add("--hidden", type=int, default=512, help="width of target and head (default %(default)s)")
    add("--inner", type=int, default=1376, help="width of the head's MLP (default %(default)s)")
    add("--heads", type=int, default=8, help="of attention (default %(default)s)")
    add("--vocab", type=int, default=32000, help="tokens of target and head (default %(default)s)")
    add("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    add("settings", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    ones = ("repeats", "threads", "conversations", "steps", "hidden", "inner", "heads", "vocab")
    at_least(args, **dict.fromkeys(ones, 1), length=32)
    if args.hidden % (2 * args.heads):
        raise InputError(f"--hidden must be a multiple of twice --heads={args.heads}, got {args.hidden}")
    return args


@command("bench_train")
def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    args = arguments(argv)
    if args.side:
        run_side(args.side, json.loads(args.settings))
        return
    bench = Bench(args)
    figures = bench.against_reference()
    if args.peer:
        figures |= bench.against_speculators()
    bench.bar.close()
    figures["settings"] = bench.shape | {
        "repeats": args.repeats,
        "device": f"cpu ({platform.machine()})",
        "commit": checkpoints.git_commit(),
        "torch": torch.__version__,
    }
    publish(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
