"""Files that are written whole or not at all: under another name first, then renamed.

Invariant: whoever reads sees the old file or the new one, never a part, whenever the writer is stopped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside a file to write to; it becomes the file when the block ends, and is removed when the block fails.

    Args:
        path: the file, in a folder that exists.
    """
    # Of this process: two that write one file must not take each other's.
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a text file in UTF-8.

    Args:
        errors: what becomes of characters that UTF-8 cannot hold, as `str.encode` takes it.
    """
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors=errors)
