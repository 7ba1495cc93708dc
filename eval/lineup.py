"""Who is compared: plain decoding, training-free methods, and any number of heads under each of their policies.

Invariant: plain decoding comes first and is there once, however many heads there are; every other one has a name of its
own, under which its results, its settings and its figures are found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from eval.bench import Method
from eval.options import ALL
from eval.tasks import PLAIN
from mmspec import checkpoint as checkpoints
from mmspec.api import (
    FREE,
    MEASURED,
    STATIC,
    STATIC_TREE,
    TRAINED,
    drafter_and_policy,
    make_drafter,
    method_and_policy,
)
from mmspec.checkpoint import Checkpoint, DraftTree
from mmspec.drafters.null import NullDrafter
from mmspec.methods import HYBRID, Settings, method_names, resolved
from mmspec.policy import SkipPolicy
from mmspec.types import InputError, Sampler, Target

VISKIP = "viskip"
AGAIN = "plain_again"
"""Plain decoding beside itself: what the clock alone makes of equal work."""
STEERED = ("fixed", *STATIC, *(name for name in FREE if name != "fixed"), *TRAINED)
"""What may steer a head, in the order of the table."""
NO_HEAD: dict[str, Any] = {"drafter_hash": None, "params": 0}
"""Of a drafter without weights."""


@dataclass(frozen=True)
class Head:
    """A checkpoint that takes part.

    Args:
        name: its own among all that take part.
        checkpoint: with the tree to decode with.
        policies: of `STEERED`; it has what they need.
    """

    name: str
    checkpoint: Checkpoint
    policies: tuple[str, ...] = ("fixed",)


def choose_methods(args: argparse.Namespace) -> list[str]:
    """The training-free methods to score, and hybrids, in the order they were asked for.

    `hybrid` is one with each head; HEAD_hybrid, as the tables call it, that with one head (`check_hybrids`).

    Raises:
        InputError: an unknown name, or options that need a checkpoint or exclude these methods.
    """
    if not args.ckpt and not args.method:
        raise InputError("give --ckpt DIR, or --method all for the methods that need no training")
    known = [*method_names(), HYBRID]
    unknown = [name for name in args.method if name not in (*known, PLAIN, ALL) and kind_of(name) != HYBRID]
    if unknown:
        raise InputError(f"--method {unknown[0]} is unknown; use {', '.join(known)}, {PLAIN}, or {ALL}")
    if args.method and args.verifier == "rejection":
        raise InputError("--verifier rejection needs candidates drawn by a head; those of --method are chosen")
    if not args.ckpt:
        if HYBRID in map(kind_of, args.method):
            raise InputError("--method hybrid needs --ckpt: its head drafts where there is nothing to copy")
        alone = [option for option in ("policies", "share_noise") if getattr(args, option)]
        if alone:
            raise InputError(f"--{alone[0].replace('_', '-')} needs --ckpt: it is about the checkpoint's head")
    if args.method_settings and not args.method:
        raise InputError("--method-settings needs --method")
    if ALL not in args.method:
        spare = HYBRID in args.method  # those of single heads, then
        return [name for name in dict.fromkeys(args.method) if not (spare and name != kind_of(name))]
    return [
        name for name in (PLAIN, *known) if (name != PLAIN or PLAIN in args.method) and (args.ckpt or name != HYBRID)
    ]


def kind_of(name: str) -> str:
    """What a name of `--method` has settings under: its own, but `hybrid` for the hybrid of one head too."""
    return HYBRID if name.endswith(f"_{HYBRID}") else name


def _behind(name: str, heads: Sequence[Head]) -> list[Head]:
    """The heads that a hybrid copies in front of."""
    return [head for head in heads if name in (HYBRID, f"{head.name}_{HYBRID}")]


def check_hybrids(named: Sequence[str], heads: Sequence[Head]) -> None:
    """Raises InputError where the hybrid of a head is asked for that is not among the heads."""
    for name in named:
        if kind_of(name) == HYBRID and not _behind(name, heads):
            there = ", ".join(f"{head.name}_{HYBRID}" for head in heads)
            raise InputError(f"--method {name}: no --ckpt has a head of that name; use {there}, or {HYBRID} for all")


def choose_heads(
    folders: Sequence[str],
    trees: Sequence[Sequence[int]] = (),
    wanted: Sequence[str] | None = None,
    target: str | None = None,
    dtype: str = "float32",
) -> list[Head]:
    """The heads to score, each under its name.

    Args:
        folders: run folders, or places on the Hub.
        trees: (depth, width, nodes): one for all, or one for each; without, those of the checkpoints.
        wanted: policies; each steers the heads that have what it needs. None: the fixed tree, and a controller's.
        target, dtype: of heads of the Hub in another layout, see `mmspec.checkpoint.load`.

    Raises:
        InputError: a folder is no checkpoint, no head has what a policy needs, or names are not to be told apart.
    """
    loaded = [checkpoints.load(folder, target, dtype) for folder in folders]
    each = list(trees) * len(loaded) if len(trees) == 1 else list(trees)
    loaded = [replace(one, tree=DraftTree(*tree)) for one, tree in zip(loaded, each)] if each else loaded
    policies = choose_policies(wanted, loaded)
    return [Head(*entry) for entry in zip(head_names(loaded), loaded, policies)]


def choose_policies(wanted: Sequence[str] | None, heads: Sequence[Checkpoint]) -> list[tuple[str, ...]]:
    """What steers each head. Raises InputError when no head has what a policy needs, or a head gets none."""
    can = [
        set(STEERED)
        - (set(TRAINED) if head.viskip is None else set())
        - (set() if (head.folder / STATIC_TREE).is_file() else {"static"})
        for head in heads
    ]
    if wanted is None:
        return [tuple(name for name in ("fixed", VISKIP) if name in mine) for mine in can]
    asked = list(dict.fromkeys(wanted))
    what = {
        **dict.fromkeys(TRAINED, "a controller (viskip.safetensors)"),
        "static": f"a {STATIC_TREE} (scripts/fit_tree.py makes one)",
    }
    for name in asked:
        if heads and not any(name in mine for mine in can):
            has = "this checkpoint has no" if len(heads) == 1 else "none of these checkpoints has"
            raise InputError(f"--policies {name}: {has} {what[name].removeprefix('a ')}; use fixed")
    chosen = [tuple(name for name in STEERED if name in asked and name in mine) for mine in can]
    for head, mine in zip(heads, chosen):
        if not mine:
            raise InputError(f"--policies {' '.join(asked)}: none of them can steer {head.folder}; add fixed")
    return chosen


def head_names(heads: Sequence[Checkpoint]) -> list[str]:
    """A name each: its kind; of one kind, their folders' names; of one folder, with their trees (7x2x10).

    Raises:
        InputError: they are still the same.
    """
    names = [head.kind for head in heads]
    folders = [head.folder.resolve().name for head in heads]
    trees = [f"{head.tree.depth}x{head.tree.width}x{head.tree.budget}" for head in heads]
    for better in (folders, [f"{folder}_{tree}" for folder, tree in zip(folders, trees)]):
        times = Counter(names)
        names = [new if times[name] > 1 else name for name, new in zip(names, better)]
    times = Counter(names)
    if same := [name for name in names if times[name] > 1]:
        raise InputError(
            f"--ckpt: two run folders are both called {same[0]}; rename one, or give it a --tree of its own"
        )
    return names


def check_frozen(args: argparse.Namespace, named: Sequence[str], given: Settings) -> None:
    """Raises InputError where `--frozen` is asked of a method that keeps what it has seen."""
    if args.frozen and "recycling" in named and (given.get("recycling") or {}).get("persist"):
        raise InputError("--frozen: recycling.persist=true shares what was seen between requests; set it to false")
    priced = ["--method-budget marginal"] if args.method_budget == "marginal" else []
    if HYBRID in map(kind_of, named):
        priced = [HYBRID]
    if args.frozen and named and priced:
        raise InputError(f"--frozen: {priced[0]} goes by what earlier copies were worth; leave it out")


def make_methods(
    target: Target,
    heads: Sequence[Head],
    batch_size: int,
    sampler: Sampler | None = None,
    widths: Sequence[int] = (),
    named: Sequence[str] = (),
    given: Settings | None = None,
    budget: str = "adaptive",
    costs: Path | None = None,
) -> tuple[list[Method], dict[str, Any]]:
    """Plain decoding, training-free methods, and each head under each of its policies.

    Args:
        target: what is drafted for.
        heads: were checked against the target; a controller's costs on this machine are kept in its head's folder.
        batch_size: rows decoded together; part of what the cost table is measured for.
        sampler: the run's, for a head that drafts with its noise, or draws.
        widths: of the trees of a head that draws, else empty.
        named: training-free methods, and hybrids.
        given: their settings.
        budget: their policy, of `mmspec.api.METHOD_POLICIES`.
        costs: folder in which what their rounds cost is kept; None measures it anew.

    Returns:
        The methods, plain first, and their settings in plain words for the summary.

    Raises:
        InputError: two of them have one name, or see `mmspec.api.method_and_policy`.
    """
    methods = [Method(PLAIN, NullDrafter(), SkipPolicy(), {"drafter": "none"} | NO_HEAD)]
    settings: dict[str, Any] = {PLAIN: {"drafter": "none", "policy": "never draft"}}
    drafters = {head.name: make_drafter(head.checkpoint, target, sampler, widths) for head in heads}

    facts = {head.name: _facts(head.checkpoint) for head in heads}

    def add(name: str, drafter: Any, policy: Any, how: dict[str, Any], said: dict[str, Any]) -> None:
        if name in settings:
            raise InputError(f"two of what is compared are called {name}; rename a run folder of --ckpt")
        methods.append(Method(name, drafter, policy, said))
        settings[name] = how

    for name in named:
        if name == PLAIN:
            add(AGAIN, NullDrafter(), SkipPolicy(), settings[PLAIN], methods[0].facts)
            continue
        kind = kind_of(name)
        mine = (given or {}).get(kind)
        for head in _behind(name, heads) if kind == HYBRID else [None]:
            label = f"{head.name}_{kind}" if head and len(heads) > 1 else kind
            table = costs / f"{label}-{batch_size}" if costs else None
            ckpt, drafter = (head.checkpoint, drafters[head.name]) if head else (None, None)
            pair = method_and_policy(kind, target, mine, ckpt, drafter, budget, batch_size, table)
            said = (facts[head.name] if head else NO_HEAD) | {"drafter": kind}
            add(label, *pair, {"drafter": kind, "policy": budget, **without_places(resolved(kind, mine))}, said)
    lone = sum(not set(TRAINED).isdisjoint(head.policies) for head in heads) == 1
    for head in heads:
        for policy in head.policies:
            pair = drafter_and_policy(head.checkpoint, target, policy, batch_size, drafters[head.name], sampler)
            said = facts[head.name] | (_priced(pair[1]) if policy in MEASURED else {})
            add(_label(head, policy, lone), *pair, _described(head.checkpoint, policy, pair[1]), said)
    return methods, settings


def _label(head: Head, policy: str, lone: bool) -> str:
    """The name of a head under a policy."""
    if policy == "fixed":
        return head.name
    if policy in TRAINED and lone:
        return policy
    return f"{head.name}_{policy.removeprefix(head.checkpoint.kind)}"


def _described(ckpt: Checkpoint, policy: str, decides: Any) -> dict[str, Any]:
    """A head's settings under a policy."""
    how = {"drafter": ckpt.kind, "checkpoint": ckpt.folder.resolve().name}
    if policy not in STATIC:
        return {**how, "policy": "learned" if policy == VISKIP else policy, **asdict(ckpt.tree)}
    tree = STATIC_TREE if policy == "static" else policy
    return {**how, "policy": "fixed", "tree": tree, "depth": decides.max_depth, "budget": decides.max_budget}


def _facts(ckpt: Checkpoint) -> dict[str, Any]:
    """A head in every line of its results: its kind, the hash of its weights, and how many of them there are."""
    path = ckpt.folder / "head.safetensors"
    with safe_open(path, "pt") as weights:
        params = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return {"drafter": ckpt.kind, "drafter_hash": file_hash(path), "params": params}


def _priced(decides: Any) -> dict[str, str]:
    """A hash of the costs that a policy of `MEASURED` decides by, for the lines of its results: by others its plans are
    others, and they lie beside the head, where any command may measure them again."""
    table = json.dumps(asdict(decides.costs), sort_keys=True)
    return {"costs": hashlib.sha256(table.encode()).hexdigest()[:16]}


def named_files(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of the files that a method's settings name, each under its setting."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found[key] = named_files(value)
        elif isinstance(value, str) and Path(value).is_file():
            found[key] = file_hash(Path(value))
    return found


def file_hash(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def without_places(value: Any) -> Any:
    """Settings without this machine's folder names, all the way down: of a file its name."""
    if isinstance(value, Mapping):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(part) for part in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value
