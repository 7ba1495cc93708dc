"""Verification passes of fixed shape, and their replay as CUDA graphs.

A pass over a small tree is hundreds of short kernels, which take longer to launch one by one than to run. A CUDA graph
launches them at once, but knows only the shapes and addresses it was captured with. So the tree is padded to a fixed
number of nodes, the cache is read through a window of fixed width, and where the nodes go is a number on the device.

Invariant: padding is masked like any node of another branch, so a pass gives what the pass of changing shapes gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmspec.cache import RaggedKV
from mmspec.types import Forward, Tree

WINDOW = 256
"""Slots by which the window grows: each width is captured once."""

Verify = Callable[[Tensor, Tensor, Tensor], Forward]
"""(tokens [B, N], positions [B, N], additive mask [B, 1, N, S]) -> Forward; keys and values go to the cache."""


def padded_nodes(n: int) -> int:
    """Nodes a tree of n is padded to: few shapes, and no more than 8 nodes for nothing."""
    return 1 << (n - 1).bit_length() if n <= 8 else -(-n // 8) * 8


def padded_slots(n: int) -> int:
    """Capacity for n slots: whole windows, with room for the nodes that a tree is padded with."""
    return -(-(n + 8) // WINDOW) * WINDOW


class StaticPass:
    """One shape of pass over one decoding state.

    Args:
        kv: the state's buffers.
        rope_delta: [B] int64 of the state.
        nodes, window: N and S.
        verify: the text model from embeddings to logits.

    Memory: inputs of B * N * (N + 16) bytes, a mask of B * N * S elements, and outputs of B * N * (V + D) elements; the
    graphs of a device share one pool.
    """

    def __init__(self, kv: RaggedKV, rope_delta: Tensor, nodes: int, window: int, verify: Verify) -> None:
        B, device = rope_delta.shape[0], rope_delta.device
        self.kv, self.rope_delta, self.verify = kv, rope_delta, verify
        self.tokens = torch.zeros((B, nodes), dtype=torch.long, device=device)
        self.depths = torch.zeros_like(self.tokens)
        self.ancestors = torch.eye(nodes, dtype=torch.bool, device=device).repeat(B, 1, 1)
        self.eye = self.ancestors.clone()
        self.offset = torch.zeros((), dtype=torch.long, device=device)
        self.nodes = torch.arange(nodes, device=device)
        self.columns = torch.arange(window, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Forward | None = None

    def load(self, trees: Tree) -> None:
        """Copy trees in; what lies behind their nodes becomes padding, which sees itself alone."""
        n = trees.tokens.shape[1]
        self.tokens[:, :n] = trees.tokens
        self.depths[:, :n] = trees.depths
        self.ancestors.copy_(self.eye)
        self.ancestors[:, :n, :n] = trees.ancestors
        self.offset.fill_(self.kv.offset)

    def compute(self) -> Forward:
        """The pass itself: tensors in, tensors out, nothing that depends on the host."""
        lengths, dtype = self.kv.lengths_device, self.kv.data.dtype
        (B, N), S = self.tokens.shape, len(self.columns)
        slots = self.offset + self.nodes
        hidden = (self.columns >= lengths.unsqueeze(1)).view(B, 1, 1, S)
        mask = torch.zeros((B, 1, N, S), dtype=dtype, device=slots.device).masked_fill_(hidden, float("-inf"))
        tree = torch.zeros((B, 1, N, N), dtype=dtype, device=slots.device)
        mask.index_copy_(3, slots, tree.masked_fill_(~self.ancestors.unsqueeze(1), float("-inf")))
        self.kv.begin_static(slots, S)
        return self.verify(self.tokens, (lengths + self.rope_delta).unsqueeze(1) + self.depths, mask)

    def capture(self, pool: Any) -> None:
        """Record `compute` as a graph, and compare its first replay with the pass it replaces.

        Raises:
            RuntimeError: something in the model cannot be captured, or does not repeat what it did.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in their first calls, which a graph must not hold
            self.compute()
            plain = self.compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.outputs = self.compute()
        graph.replay()
        if not torch.allclose(self.outputs.logits.float(), plain.logits.float(), rtol=1e-2, atol=1e-2):
            raise RuntimeError("the captured pass gives other logits than the pass it was captured from")
        self.graph = graph

    def run(self, n: int) -> Forward:
        """Outputs of the first n nodes. Those of a graph are overwritten by its next replay."""
        if self.graph is not None:
            self.graph.replay()
        out = self.outputs if self.graph is not None else self.compute()
        assert out is not None
        hidden = {tap: states[:, :n] for tap, states in out.hidden.items()}
        mass = None if out.visual_mass is None else out.visual_mass[:, :n]
        return replace(
            out, logits=out.logits[:, :n], last_hidden=out.last_hidden[:, :n], hidden=hidden, visual_mass=mass
        )


class StaticPasses:
    """The passes of one decoding state, each made when its shape first comes up.

    Args:
        kv, rope_delta: of the state.
        verify: makes the `Verify` function for some taps.
    """

    def __init__(self, kv: RaggedKV, rope_delta: Tensor, verify: Callable[[tuple[int, ...]], Verify]) -> None:
        self.kv, self.rope_delta, self.verify = kv, rope_delta, verify
        self.known: dict[tuple[int, int, tuple[int, ...]], StaticPass] = {}
        self.pool: Any = torch.cuda.graph_pool_handle() if rope_delta.device.type == "cuda" else None
        self.broken = False

    def run(self, trees: Tree, taps: tuple[int, ...]) -> Forward:
        """Verify trees; see `HFTarget.forward`."""
        nodes, kv = padded_nodes(trees.tokens.shape[1]), self.kv
        kv.begin_tree(nodes)
        window = min(-(-(kv.offset + nodes) // WINDOW) * WINDOW, kv.capacity)
        key = (nodes, window, taps)
        fresh = key not in self.known
        if fresh:
            self.known[key] = StaticPass(kv, self.rope_delta, nodes, window, self.verify(taps))
        one = self.known[key]
        one.load(trees)
        if fresh and self.pool is not None and not self.broken:
            try:
                one.capture(self.pool)
            except Exception as error:  # whatever the model does that a graph cannot hold, decoding goes on without
                self.broken = True
                warnings.warn(f"decoding without CUDA graphs: {' '.join(str(error).split())}", stacklevel=2)
        return one.run(trees.tokens.shape[1])
