"""What the commands share about their command lines: an error in one line, and the least that an option may be."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mmspec.types import InputError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as any other wrong input: in one line, which the command's `main` prints."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage block in front, and ends the process."""

    def error(self, message: str) -> NoReturn:
        # The command's name without how it is called.
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {message} (--help shows examples)\n")


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
