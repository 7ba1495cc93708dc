"""What the commands share: an error in one line, exit codes, and the least that an option may be."""

from __future__ import annotations

import argparse
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

from mmspec.types import InputError

P = ParamSpec("P")
PATIENCE_S = 20.0
"""How long a rank above 0 waits for rank 0 to report the error they share."""


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's variables; (0, 1, 0) without a launcher."""
    rank, size, local = (int(os.environ.get(*one)) for one in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    return rank, size, local


class Parser(argparse.ArgumentParser):
    """Texts keep their lines, and a wrong command line is reported as any other wrong input: in one line, which
    `command` prints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def command(
    program: str, interrupted: str = "", wrong: tuple[type[Exception], ...] = (InputError,)
) -> Callable[[Callable[P, int | None]], Callable[P, int]]:
    """Makes what a command does its `main`, which returns the exit code: 2 for wrong input, told in one line, 130 when
    interrupted, else what the function returns (None is 0).

    Args:
        program: what stands in front of each line.
        interrupted: what an interruption means for the user; without it, one is not caught.
        wrong: errors that are wrong input.
    """

    def decorate(work: Callable[P, int | None]) -> Callable[P, int]:
        @functools.wraps(work)
        def main(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return work(*args, **kwargs) or 0
            except wrong as error:
                if launched_as()[0] > 0:
                    # All ranks find the same fault. The launcher ends the others as soon as one ends, so those above 0
                    # give rank 0 the time to speak; if it did not find the fault, they do.
                    default_signals()
                    time.sleep(PATIENCE_S)
                print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
                return 2
            except KeyboardInterrupt:
                if not interrupted:
                    raise
                print(f"{program}: interrupted; {interrupted}", file=sys.stderr)
                return 130

        return main

    return decorate


def as_temperature(text: str) -> float:
    """Type of an option: 0, which is greedy, or a positive number."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) or a positive number, got {text}")
    return value


def as_share(text: str) -> float:
    """Type of an option: 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def as_top_p(text: str) -> float:
    """Type of an option: the probability to sample in, above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """What a command that works by a recipe is told: its file, and keys to change (`mmspec.recipe.load`)."""
    parser.add_argument("recipe", help="YAML file, as in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")


def add_bad_share(parser: argparse.ArgumentParser) -> None:
    """The option of a command that reads records: how many may be unusable (`Quarantine.check`)."""
    parser.add_argument(
        "--max-bad-share",
        type=as_share,
        default=0.05,
        metavar="S",
        help="stop when more than this share of the records is unusable (default: 0.05)",
    )


def _number(text: str) -> float:
    """Not a number where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def default_signals() -> None:
    """Back to dying at once, for a process that only waits for its end."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


def at_least(args: argparse.Namespace, **least: int) -> None:
    """Checks numbers given as options; one that was not given (None) is right, of a list each must be.

    Args:
        args: parsed options.
        least: the least value of each, by name.

    Raises:
        InputError: one is smaller; names the option, what it must be and what it is.
    """
    for name, bound in least.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < bound:
                raise InputError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
