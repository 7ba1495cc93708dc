"""Files that ship with the package: the embedded target, a small LLaVA in Hugging Face layout."""

from pathlib import Path

TINY_LLAVA: Path = Path(__file__).resolve().parent / "tiny_llava"
"""Folder of the embedded target; `AutoProcessor.from_pretrained` and its like load it as they load any other."""

EMBEDDED = "tiny_llava"
"""The name of the embedded target."""

_NAMES = (EMBEDDED, f"embedded:{EMBEDDED}")


def resolve(name: str) -> str:
    """The folder of an embedded asset, or the name itself.

    Args:
        name: "tiny_llava" or "embedded:tiny_llava", or any path or Hub id.

    Returns:
        The path of the embedded folder for one of its two names; anything else unchanged.
    """
    return str(TINY_LLAVA) if name in _NAMES else name
