"""Ragged key-value buffers: one preallocated tensor, rows of different lengths, commits without copying the cache.

Layout: `data [n_layers, 2, B, H, S, Dh]`, keys at index 0 and values at 1. Row `b` holds its committed tokens in slots
`0..lengths[b]-1`. A tree pass writes the N nodes of *every* row to the same slots `offset..offset+N-1` with
`offset = max(lengths)`, a plain slice instead of a scatter; what lies between a row's length and the offset is masked.
A commit moves each row's kept nodes to its own end, for all layers at once; when they lie there already (one row and
the first nodes in order, as in a chain) it moves nothing.

Memory: `n_layers * 2 * B * H * S * Dh` elements, with `S = max_tokens + max_nodes`, and nothing else that grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """Host numbers as a tensor on a device, behind what the device was given before and without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    # Only from pinned memory is a copy asynchronous.
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


class RaggedKV:
    """Key-value buffers of a batch.

    Args:
        n_layers, batch, n_heads, capacity, head_dim: the shape above; capacity counts slots, tree nodes included.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeroed, not empty: masked slots are multiplied by probability 0, and 0 * NaN would be NaN.
        self.data = torch.zeros((n_layers, 2, batch, n_heads, capacity, head_dim), dtype=dtype, device=device)
        self._keys = [self.data[i, 0] for i in range(n_layers)]
        self._values = [self.data[i, 1] for i in range(n_layers)]
        self.lengths = [0] * batch
        self.lengths_device = torch.zeros(batch, dtype=torch.long, device=device)
        self._row: int | None = None
        self._slots: Tensor | None = None
        self._window = 0
        self.offset = 0

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def begin_prefill(self, row: int) -> None:
        """The next pass fills one row from its start."""
        self._row, self._slots, self.offset = row, None, 0
        self.set_length(row, 0)

    def begin_tree(self, n_nodes: int) -> None:
        """The next pass writes `n_nodes` tree nodes of all rows behind the longest one.

        Raises:
            ValueError: when they do not fit; open the state with a larger `max_tokens`.
        """
        self._row, self._slots, self.offset = None, None, max(self.lengths)
        if self.offset + n_nodes > self.capacity:
            raise ValueError(
                f"{self.offset} tokens and {n_nodes} nodes exceed the KV capacity of {self.capacity} slots"
            )

    def begin_static(self, slots: Tensor, window: int) -> None:
        """The running tree pass is one of fixed shape: it writes where a tensor says, and sees a window of fixed width.

        Args:
            slots: [N] int64 on the device, `offset..offset+N-1`.
            window: slots that `write` returns, at least `offset + N`; what is beyond is for the mask to hide.
        """
        self._slots, self._window = slots, window

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the running pass, and return all that it may look at.

        Args:
            keys, values: [B, H, M, Dh] (prefill: [1, H, M, Dh]).

        Returns:
            Views [B, H, offset + M, Dh] (prefill: [1, H, M, Dh]).
        """
        all_keys, all_values = self._keys[layer], self._values[layer]
        if self._slots is not None:
            all_keys.index_copy_(2, self._slots, keys)
            all_values.index_copy_(2, self._slots, values)
            return all_keys[:, :, : self._window], all_values[:, :, : self._window]
        end = self.offset + keys.shape[2]
        if self._row is not None:
            all_keys, all_values = all_keys[self._row : self._row + 1], all_values[self._row : self._row + 1]
        all_keys[:, :, self.offset : end] = keys
        all_values[:, :, self.offset : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def set_length(self, row: int, length: int) -> None:
        self.lengths[row] = length
        self.lengths_device[row] = length

    def commit(self, path: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """Keep each row's path of the last tree pass, drop the rest.

        Args:
            path: [B, P] int64 node indices on the device; entries beyond a row's path may be anything valid.
            paths: the same on the host, cut to what is kept; empty for rows that keep nothing.
        """
        moved = [
            b
            for b, (n, p) in enumerate(zip(self.lengths, paths))
            if p and not (n == self.offset and tuple(p) == tuple(range(len(p))))
        ]
        if moved and (len(paths) == 1 or self.data.device.type == "cpu"):
            self._move_rows(moved, path, paths)
        elif moved:
            self._move(
                self.offset + path, self.lengths_device.unsqueeze(1) + torch.arange(path.shape[1], device=path.device)
            )
        self.advance([len(p) for p in paths])

    def append(self, layer: int, keys: Tensor, values: Tensor, counts: Sequence[int]) -> None:
        """Add `counts[b]` entries to row `b` for good (columns beyond a row's count land in free slots).

        Args:
            keys, values: [B, H, M, Dh] with M = max(counts).
        """
        M = keys.shape[2]
        if max(self.lengths) + M > self.capacity:
            raise ValueError(f"{max(self.lengths)} + {M} entries exceed the KV capacity of {self.capacity} slots")
        if len(set(self.lengths)) == 1:
            start = self.lengths[0]
            self._keys[layer][:, :, start : start + M] = keys
            self._values[layer][:, :, start : start + M] = values
        else:
            slots = self.lengths_device.unsqueeze(1) + torch.arange(M, device=keys.device)
            index = slots[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            self._keys[layer].scatter_(2, index, keys)
            self._values[layer].scatter_(2, index, values)

    def advance(self, counts: Sequence[int]) -> None:
        """Count appended entries as committed, once all layers have them."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts)]
        one = len(set(counts)) == 1
        self.lengths_device += counts[0] if one else upload(counts, self.lengths_device.device)

    def visible(self, width: int) -> Tensor:
        """[B, width] bool: which of the first `width` slots hold committed tokens.

        Slot 0 always counts, or an idle row would have nothing to attend to and turn into NaN.
        """
        return torch.arange(width, device=self.lengths_device.device) < self.lengths_device.clamp_min(1).unsqueeze(1)

    def _move_rows(self, rows: Sequence[int], path: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """Row by row, each a copy of whole entries: on a CPU several times faster than an index for every number."""
        slots = self.offset + path
        for b in rows:
            data, n, kept = self.data[:, :, b], self.lengths[b], len(paths[b])
            data[:, :, :, n : n + kept] = data.index_select(3, slots[b, :kept])

    def _move(self, source: Tensor, target: Tensor) -> None:
        """One gather and one scatter for all layers, [B, P] slots each; the gather is a copy, so overlap is safe."""
        n_layers, _, B, H, _, Dh = self.data.shape
        P = source.shape[1]
        shape = (n_layers, 2, B, H, P, Dh)
        kept = self.data.gather(4, source[None, None, :, None, :, None].expand(shape))
        self.data.scatter_(4, target[None, None, :, None, :, None].expand(shape), kept)
