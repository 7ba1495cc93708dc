"""Talk to a target that decodes with a draft head or a training-free method, and watch which tokens were proposed.

python -m mmspec.chat --ckpt runs/viskip_tiny --image picture.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from mmspec.api import POLICIES, Answer, Speculator
from mmspec.arguments import Parser, as_temperature, as_top_p, at_least, command
from mmspec.assets import EMBEDDED
from mmspec.drafters.null import NullDrafter
from mmspec.methods import method_names, read_settings
from mmspec.metrics import skip_rate
from mmspec.policy import SkipPolicy
from mmspec.records import RecordError, open_image
from mmspec.types import Emission, InputError

STYLES = {"accepted": "green", "bonus": "bold yellow", "skip": "magenta", "prefill": "bold yellow"}

EXAMPLES = """\
examples
  one question:
    python -m mmspec.chat --ckpt runs/viskip_tiny --image picture.png --prompt "What do you see in this image?"
  a conversation (an empty line or Ctrl-D ends it, /image FILE starts anew with another picture):
    python -m mmspec.chat --ckpt runs/viskip_tiny --image picture.png
  without a checkpoint, with a training-free method on the embedded target:
    python -m mmspec.chat --method pld --image picture.png --prompt "Describe it."
  the same answer without drafting afterwards, to see what the head is worth here:
    python -m mmspec.chat --ckpt runs/viskip_tiny --image picture.png --prompt "Describe it." --compare

colours
  green    draft tokens that the target accepted
  yellow   tokens that the target chose itself after a draft (the bonus token of each round)
  magenta  tokens of rounds in which the policy skipped drafting
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m mmspec.chat",
        description="Streams an answer in the terminal and shows which tokens the draft head proposed.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="run folder, or hub:org/name[@revision]; not needed with --method")
    add("--method", metavar="NAME", help=f"draft with {', '.join(method_names())}, or hybrid (needs --ckpt)")
    add("--method-settings", metavar="FILE", help="settings of methods, such as recipes/methods/training_free.yaml")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="picture; may be given several times")
    add("--prompt", metavar="TEXT", help="one question; without it, a conversation")
    add("--system", metavar="TEXT", help="system text (default: none)")
    add("--target", metavar="NAME", help=f"target to decode with (default: the checkpoint's, without one {EMBEDDED})")
    add(
        "--policy", choices=POLICIES, default="auto", help="what decides how much to draft (default: viskip if trained)"
    )
    add("--dtype", default="float32", help="float32 (default), bfloat16, float16 or float64")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="per answer (default: 256)")
    add("--temperature", type=as_temperature, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K best tokens; 0 is off (default)")
    add(
        "--top-p", type=as_top_p, default=1.0, metavar="P", help="sample in the best P of probability (default: 1, off)"
    )
    add("--seed", type=int, default=0, help="of the sampling noise (default: 0)")
    add("--compare", action="store_true", help="decode each answer once more without drafting, and compare")
    return parser


class Painter:
    """Turns emissions into coloured text as they come.

    Args:
        decode: token ids to text.
        show: receives each finished piece.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], show: Callable[[Text], None]) -> None:
        self.decode, self.show = decode, show
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, emission: Emission) -> None:
        drafted = emission.tokens[: emission.accepted]
        own = emission.tokens[emission.accepted :]
        self.add(drafted, STYLES["accepted"])
        self.add(own, STYLES.get(emission.action, STYLES["bonus"]))

    def add(self, tokens: Sequence[int], style: str) -> None:
        """Show what these tokens add to the text; a piece that ends inside a character waits for the next one."""
        if not tokens:
            return
        self.tokens += tokens
        text = self.decode(self.tokens)
        if text.endswith("\ufffd") or not text.startswith(self.shown):
            return
        self.show(Text(text[len(self.shown) :].lstrip() if not self.shown else text[len(self.shown) :], style))
        self.shown = text

    def flush(self) -> None:
        """Show what is still waiting."""
        text = self.decode(self.tokens)
        if text != self.shown and text.startswith(self.shown):
            self.show(Text(text[len(self.shown) :], STYLES["bonus"]))


def footer(answer: Answer) -> str:
    """What an answer cost: tokens, tau, speed, skipped rounds."""
    output = answer.output
    parts = [f"{len(output.tokens)} tokens in {output.latency_s:.2f} s", f"{answer.tokens_per_s:.1f} tokens/s"]
    if output.rounds:
        parts += [f"tau {answer.mat:.2f}", f"{skip_rate([output]):.0%} of {len(output.rounds)} rounds skipped"]
    if output.finish_reason != "stop":
        parts.append(f"ended by {output.finish_reason}")
    return ", ".join(parts)


class Chat:
    """A conversation about some pictures.

    Args:
        model: loaded.
        args: the command line.
        console: where it is shown.
    """

    def __init__(self, model: Speculator, args: argparse.Namespace, console: Console) -> None:
        self.model, self.args, self.console = model, args, console
        self.plain = Speculator(model.target, NullDrafter(), SkipPolicy())
        self.begin([open_image(path) for path in args.image])

    def begin(self, images: list[Image.Image]) -> None:
        """Forget what was said."""
        self.images = images
        system = [{"type": "text", "text": self.args.system}] if self.args.system else []
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str) -> bool:
        """Stream the answer to one question; False when it failed."""
        fresh = not any(m["role"] == "user" for m in self.messages)
        content = [{"type": "image"} for _ in self.images] if fresh else []
        asked = [*self.messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        painter = Painter(self.model.target.decode, lambda piece: self.console.print(piece, end="", soft_wrap=True))
        answer = self._answer(self.model, asked, painter)
        painter.flush()
        self.console.print()
        if answer.error:
            self.console.print(f"error: {answer.error}", style="red", markup=False, highlight=False)
        if not answer.output.tokens:
            return False
        self.console.print(footer(answer), style="dim", highlight=False)
        if self.args.compare:
            self._compare(asked, answer)
        self.messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        return True

    def _compare(self, asked: list[dict[str, Any]], answer: Answer) -> None:
        plain = self._answer(self.plain, asked, None)
        same = "the same tokens" if plain.output.tokens == answer.output.tokens else "OTHER tokens"
        ratio = plain.output.latency_s / answer.output.latency_s
        line = f"without drafting: {same} in {plain.output.latency_s:.2f} s; drafting was {ratio:.2f} times as fast"
        self.console.print(line, style="dim", highlight=False)

    def _answer(self, model: Speculator, messages: list[dict[str, Any]], painter: Painter | None) -> Answer:
        args = self.args
        return model.generate(
            [messages],
            [self.images],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            on_emission=painter,
        )[0]

    def converse(self) -> None:
        """Questions from the terminal until an empty line."""
        while True:
            try:
                line = self.console.input("[bold cyan]> [/]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not line:
                return
            if line.startswith("/image "):
                try:
                    self.begin([open_image(Path(line.removeprefix("/image ").strip()))])
                except RecordError as error:
                    self.console.print(f"error: {error}", style="red", markup=False, highlight=False)
                continue
            self.ask(line)


def load(args: argparse.Namespace) -> Speculator:
    """The model that the command line names.

    Raises:
        InputError: neither or too much is named, or see `Speculator`.
    """
    if args.method is None:
        if args.ckpt is None:
            raise InputError(f"give --ckpt DIR, or --method with one of {', '.join(method_names())}")
        if args.method_settings is not None:
            raise InputError("--method-settings needs --method")
        return Speculator.from_pretrained(args.ckpt, args.target, args.policy, args.dtype, args.device)
    if args.policy != "auto":
        raise InputError(f"--policy {args.policy} steers a checkpoint's own head; leave it out with --method")
    settings = read_settings(args.method_settings).get(args.method) if args.method_settings else None
    return Speculator.from_method(args.method, args.target, settings, args.ckpt, args.dtype, args.device)


@command("mmspec.chat", wrong=(InputError, RecordError))
def main(argv: Sequence[str] | None = None) -> int:
    """The program.

    Returns:
        0; 1 when the one question could not be answered; 2 for wrong input, after one line about it.
    """
    args = build_parser().parse_args(argv)
    console = Console()
    at_least(args, max_new_tokens=1, top_k=0, seed=0)
    model = load(args)
    chat = Chat(model, args, console)
    # Kernels and threads settle on a throw-away question: the figures of the first answer count like the others.
    model.generate("Hello", max_new_tokens=8)
    if args.prompt is None:
        chat.converse()
        return 0
    return 0 if chat.ask(args.prompt) else 1


if __name__ == "__main__":
    sys.exit(main())
