"""Whether two pictures are one: a perceptual hash that survives another encoding, another size and a slight crop.

Invariant: a hash is 192 signs, of the lowest frequencies of a cosine transform of the luminance. The picture that is
looked for has one for each of 256 ways of cutting up to 9% from its four sides, so that a copy with any such edges
lost is close to one of them. Different photos differ in 81 bits, give or take 5; copies in 26 at most.
Source: pHash (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010), with more bits,
the sign in place of the median, and cuts.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmspec.records import RecordError

BITS = 192
SIDE = 128
"""Pixels that a picture is squeezed to, either way: its proportions do not count."""
CELLS = 32
"""Areas along each side of a window, whose means are transformed."""
FREQUENCIES = 16
MARGINS = (0.0, 0.03, 0.06, 0.09)
"""Shares of its width and height that are cut from the sides of a picture that is looked for, in every combination."""
OWN_MARGINS = (
    *((0.0, 0.0, 0.0, 0.0), (0.05, 0.05, 0.05, 0.05)),
    *((0.08, 0.0, 0.0, 0.0), (0.0, 0.08, 0.0, 0.0), (0.0, 0.0, 0.08, 0.0), (0.0, 0.0, 0.0, 0.08)),
)
"""Left, right, top and bottom cuts of a picture that is compared: the one that is looked for may be the smaller one."""
METHOD = b"192 signs, 6"
"""Part of a cache's keys: whoever changes what a hash is changes this, so that no old one is taken for a new one."""
FLAT = 3.0
"""Luminance (of 255) by which a picture must vary, or there is nothing to compare."""

Print = NDArray[np.uint64]
"""[..., 3] uint64: the bits of hashes."""


def squeeze(data: bytes) -> NDArray[np.float64] | None:
    """Luminance of an encoded picture, [SIDE, SIDE], 0 to 255; None where it is flat.

    Raises:
        RecordError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            # JPEG decodes an eighth, a quarter or half of the size at a fraction of the time.
            image.draft("L", (2 * SIDE, 2 * SIDE))
            grey = (image if image.mode == "L" else image.convert("RGB").convert("L")).resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0
            )
    except Exception as error:
        # As in mmspec.records.open_image: damaged bytes raise nearly anything.
        raise RecordError(f"image cannot be decoded: {type(error).__name__}") from None
    pixels = np.asarray(grey, dtype=np.float64)
    return pixels if pixels.std() >= FLAT else None


def cuts(pixels: NDArray[np.float64]) -> Print:
    """Hashes of all cuts of a picture that is looked for, [256, 3]; the first is of the whole."""
    n = len(_PAIRS)
    blocks = (_ANY @ pixels @ _ANY.T).reshape(n, FREQUENCIES, n, FREQUENCIES).swapaxes(1, 2)
    return _pack(blocks.reshape(n * n, -1))


def own(pixels: NDArray[np.float64]) -> Print:
    """Hashes of a picture that is compared, [len(OWN_MARGINS), 3]; the first is of the whole."""
    return _pack((_OWN_ROWS @ pixels @ _OWN_COLUMNS.swapaxes(1, 2)).reshape(len(OWN_MARGINS), -1))


class Gallery:
    """The pictures that are looked for.

    Args:
        pictures: `cuts` of each.
    """

    def __init__(self, pictures: Sequence[Print]) -> None:
        together = np.concatenate([*pictures, np.zeros((0, BITS // 64), np.uint64)])
        self._cuts = np.ascontiguousarray(together.T)
        self._wholes = np.ascontiguousarray(self._cuts[:, :: len(_PAIRS) ** 2])

    def distances(self, compared: Print) -> NDArray[np.int64]:
        """Bits in which each picture differs from one that is compared, at the closest cut of either, [n_pictures].

        Args:
            compared: its `own`.
        """
        n = self._wholes.shape[1]
        theirs = _differing(self._cuts, compared[0]).reshape(n, len(_PAIRS) ** 2)
        mine = np.stack([_differing(self._wholes, one) for one in compared], axis=1)
        return np.minimum(theirs.min(1), mine.min(1)).astype(np.int64)


class PrintCache:
    """`own` of pictures by their content, on disk, so that a search that was interrupted does not decode again.

    A file of records of a key and a hash, only ever appended to. In memory a picture takes some 350 bytes.
    """

    _KEY, _HASH = 16, len(OWN_MARGINS) * BITS // 8

    def __init__(self, path: Path) -> None:
        size = self._KEY + self._HASH
        known = path.read_bytes() if path.is_file() else b""
        whole = len(known) - len(known) % size
        self._known = {
            known[at : at + self._KEY]: known[at + self._KEY : at + size] for at in range(0, whole, size)
        }  # fmt: skip
        self._file = path.open("ab")
        # What a killed search wrote of its last record.
        self._file.truncate(whole)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Writes what is left to write."""
        self._file.close()

    def own(self, data: bytes) -> Print | None:
        """`own` of an encoded picture; None where it is flat. Raises RecordError as `squeeze` does."""
        key = hashlib.blake2b(data, digest_size=self._KEY, person=METHOD).digest()
        found = self._known.get(key)
        if found is None:
            pixels = squeeze(data)
            # No picture has all bits zero.
            found = bytes(self._HASH) if pixels is None else own(pixels).tobytes()
            with self._lock:
                self._known[key] = found
                self._file.write(key + found)
        hashes = np.frombuffer(found, np.uint64).reshape(-1, BITS // 64)
        return hashes if hashes.any() else None


def _differing(many: Print, one: Print) -> NDArray[np.uint8]:
    """Bits in which the columns of [3, n] differ from a hash [3], [n]: no more than 192, which a byte holds."""
    counts = [np.bitwise_count(row ^ word) for row, word in zip(many, one)]
    return counts[0] + counts[1] + counts[2]


def _pack(coefficients: NDArray[np.float64]) -> Print:
    """Signs of the chosen coefficients of [n, FREQUENCIES^2] as [n, 3] uint64."""
    return np.packbits(np.ascontiguousarray(coefficients[:, _CHOSEN] > 0), axis=1).view(np.uint64)


def _chosen() -> NDArray[np.int64]:
    """Places of the lowest frequencies but the mean, by u^2 + v^2."""
    places = list(itertools.product(range(FREQUENCIES), repeat=2))[1:]
    places.sort(key=lambda place: (place[0] ** 2 + place[1] ** 2, place))
    return np.array([u * FREQUENCIES + v for u, v in places[:BITS]])


def _transform(low: float, high: float) -> NDArray[np.float64]:
    """[FREQUENCIES, SIDE]: means of CELLS areas between two cuts, and their cosine transform (DCT-II, unscaled)."""
    edges = np.linspace(low * SIDE, (1 - high) * SIDE, CELLS + 1)
    pixels = np.arange(SIDE)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    areas = np.clip(covered, 0, None)
    waves = np.cos(np.pi / CELLS * np.arange(FREQUENCIES)[:, None] * (np.arange(CELLS) + 0.5))
    return waves @ (areas / areas.sum(1, keepdims=True))


_CHOSEN = _chosen()
_PAIRS = list(itertools.product(MARGINS, repeat=2))
_ANY = np.concatenate([_transform(low, high) for low, high in _PAIRS])
_OWN_ROWS = np.stack([_transform(top, bottom) for _, _, top, bottom in OWN_MARGINS])
_OWN_COLUMNS = np.stack([_transform(left, right) for left, right, _, _ in OWN_MARGINS])
