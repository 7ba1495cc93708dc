"""The calls that a decoding run makes of its modules: recorded, and replayed with nothing in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Calls:
    """Records the calls of target and head modules during a run, and replays them alone.

    A call is kept with its inputs and with where its cache stood, so a replay does the same work on the same shapes.
    """

    def __init__(self, target: Any, drafter: Any) -> None:
        self.target, self.drafter = target, drafter
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, tuple[int | None, int]]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record everything that runs inside."""
        inner = self.target.model.model
        vision = [m for name, m in inner.named_children() if "language" not in name]
        head = self.drafter.head
        handles, depth = [], [0]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if depth[0] == 0:
                cache = kwargs.get("past_key_values")
                kv = cache.layers[0].kv if cache is not None else self.drafter.kv if module is head.block else None
                where = (kv._row, kv.offset) if kv is not None else (None, 0)
                self.calls.append((module, args, dict(kwargs), kv, where))
            depth[0] += 1

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            depth[0] -= 1

        def kept(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if depth[0] == 0:  # else it is a part of a recorded call
                    self.calls.append((method, args, {}, None, (None, 0)))
                return method(*args)

            return call

        # What the catch-up computes of the block, in parts.
        parts = ("keys_values", "project", "finish")
        for name in parts:
            head.block.__dict__[name] = kept(getattr(head.block, name))
        ends = [self.target.embedding, self.target.lm_head]
        for module in [*vision, self.target.text_model, *ends, head.fc, head.block]:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in parts:
                del head.block.__dict__[name]

    @torch.inference_mode()
    def replay(self) -> None:
        """Every recorded call again, in order, with nothing in between."""
        current = self.drafter.kv
        for module, args, kwargs, kv, where in self.calls:
            if kv is not None:
                kv._row, kv.offset = where
                self.drafter.kv = kv  # the head's attention looks it up; the target's cache is among its arguments
            module(*args, **kwargs)
        self.drafter.kv = current
