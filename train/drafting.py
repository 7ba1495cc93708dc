"""Who drafts while the target answers the training questions: nobody, a trained head, or a method without training.

Invariant: answers are the target's own whoever drafts, so nothing here enters what they are keyed by. How much is
drafted is the budget that pays on this machine at this batch size, measured first; not drafting is one of the choices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from mmspec import checkpoint
from mmspec.api import make_drafter, method_and_policy
from mmspec.costs import measure
from mmspec.drafters.null import NullDrafter
from mmspec.methods import resolved
from mmspec.policy import AdaptivePolicy, SkipPolicy
from mmspec.recipe import Data
from mmspec.types import Drafter, InputError, Policy, Target


@dataclass(frozen=True)
class Drafting:
    """What answers are decoded with.

    Args:
        name: for people.
        drafter, policy: as the loop takes them.
    """

    name: str
    drafter: Drafter
    policy: Policy


PLAIN = Drafting("plain decoding", NullDrafter(), SkipPolicy())


def check_drafting(data: Data) -> None:
    """What can be known before any work starts.

    Raises:
        InputError: the head is missing or damaged, or there is no such method.
    """
    try:
        if data.answer_head is not None:
            checkpoint.load(data.answer_head)
    except InputError as error:
        raise InputError(f"data.answer_head: {error}") from error
    if data.answer_method is not None:
        try:
            resolved(data.answer_method)
        except InputError as error:
            raise InputError(f"data.answer_method: {error}") from error


def drafting(data: Data, target: Target) -> Drafting:
    """What the recipe says; costs are measured now, up to `data.answer_batch`.

    Raises:
        InputError: the head was made for another target.
    """
    loaded = None
    if data.answer_head is not None:
        loaded = checkpoint.load(data.answer_head)
        try:
            loaded.check_target(target)
        except InputError as error:
            raise InputError(f"data.answer_head: {error}") from error
    if data.answer_method is not None:
        drafter, policy = method_and_policy(data.answer_method, target, None, loaded, max_batch=data.answer_batch)
        return Drafting(data.answer_method, drafter, policy)
    if loaded is None:
        return PLAIN
    tree, drafter = loaded.tree, make_drafter(loaded, target)
    costs = measure(target, drafter, data.answer_batch, tree.depth, tree.budget)
    return Drafting(loaded.kind, drafter, AdaptivePolicy(costs, tree.depth, tree.budget))


def described(data: Data) -> dict[str, Any]:
    """The same for a manifest: without this machine's folders, the head by the hash of its weights."""
    found: dict[str, Any] = {"method": data.answer_method} if data.answer_method else {}
    if data.answer_head is not None:
        loaded = checkpoint.load(data.answer_head)
        weights = hashlib.sha256((loaded.folder / "head.safetensors").read_bytes()).hexdigest()
        found["head"] = {"folder": checkpoint.discreet(data.answer_head), "kind": loaded.kind, "sha256": weights[:16]}
    return found or {"method": "plain"}
