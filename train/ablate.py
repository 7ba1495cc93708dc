"""Controllers that lack one thing, trained on one stored rollout: what is each input, label and loss term worth?

Invariant: a round is predicted by controllers that were trained on rounds of other images alone. All variants see the
same folds, batches and rule of stopping; a part on disk is complete, and is of one rollout and one set of settings.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mmspec import checkpoint
from mmspec.heads.viskip import Config, Head
from mmspec.policy import SCALARS
from mmspec.recipe import Optim
from mmspec.types import InputError
from train.engine import learning_rate

WHOLE, CONSTANT = "whole", "constant"
INNER_SHARE = 0.15
"""Of the images that a controller may learn from: they say when to stop."""
LOOKS = 25
"""Steps between two measurements on those."""
NO_LABELS = {"n_mass": 0, "counterfactual": "none"}
VISUAL_SCALARS = [SCALARS.index(name) for name in ("log_visual", "visual_share", "has_image")]


@dataclass(frozen=True)
class Variant:
    """One controller.

    Args:
        settings: of its `Config` that differ from the whole one's.
        blank: inputs that are 0 for it: last_hidden, root_embed, scalars, or visual_scalars.
        told: whether it reads the labels themselves, which nobody knows when decoding.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    blank: tuple[str, ...] = ()
    told: bool = False


VARIANTS = {
    WHOLE: Variant(),
    "scalars alone": Variant({"reads": "scalars", **NO_LABELS}),
    "no visual heads": Variant(NO_LABELS),
    "no visual labels": Variant({"mass_weight": 0.0, "dependence_weight": 0.0, "changed_weight": 0.0}),
    "no L_r": Variant({"mass_weight": 0.0}),
    "no L_c": Variant({"dependence_weight": 0.0}),
    "no L_u": Variant({"changed_weight": 0.0}),
    "detached visual heads": Variant({"detach": True}),
    "no state": Variant(blank=("last_hidden",)),
    "no root": Variant(blank=("root_embed",)),
    "no scalars": Variant(blank=("scalars",)),
    "no visual scalars": Variant(blank=("visual_scalars",)),
    "told the labels": Variant(told=True),
}
"""What is compared; `constant` beside them knows how often each depth was accepted and nothing else."""


@dataclass(frozen=True)
class Plan:
    """How all variants are trained.

    Args:
        config: of the whole controller, resolved.
        optim, steps: of the recipe.
        folds: parts that the images are dealt into.
        seeds: of initialisation, batches and dealing; predictions are the mean logits over them.
    """

    config: Config
    optim: Optim
    steps: int
    folds: int
    seeds: int


def read_rounds(folder: Path) -> dict[str, Tensor]:
    """All rounds of a run's rollout.

    Raises:
        InputError: there is none, or it has no label of dependence or of attention.
    """
    paths = sorted((folder / "rollout").glob("chunk-*.safetensors"))
    parts = [part for part in map(load_file, map(str, paths)) if len(part["accepted"])]
    if not parts:
        raise InputError(f"{folder} has no rollout; train its controller (policy.kind=learned)")
    if not {"dependence", "visual_mass"} <= set(parts[0]):
        raise InputError(
            f"the rollout of {folder} lacks visual labels; make it with policy.controller.counterfactual=mean and "
            "policy.controller.n_mass=2"
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def dealt(images: Sequence[str], folds: int, seed: int) -> Tensor:
    """The fold [R] of each round, by its image."""
    names = sorted(set(images))
    if len(names) < folds:
        raise InputError(
            f"the rollout shows {len(names)} images, too few for {folds} folds; set policy.rollouts higher"
        )
    random.Random(f"folds/{seed}").shuffle(names)
    fold = {name: number % folds for number, name in enumerate(names)}
    return torch.tensor([fold[name] for name in images])


def predictions(
    rounds: Mapping[str, Tensor],
    images: Sequence[str],
    plan: Plan,
    out: Path,
    variants: Mapping[str, Variant],
    done: Callable[[], None],
) -> dict[str, Tensor]:
    """Held-out logits [R, Dmax] of each variant, mean over seeds, and those of `constant`.

    Args:
        rounds: with root_embed [R, D].
        images: of each round.
        plan: how to train.
        out: where finished parts are kept.
        variants: by name.
        done: is called after each part.
    """
    out.mkdir(parents=True, exist_ok=True)
    R = len(rounds["accepted"])
    sums = {name: torch.zeros(R, plan.config.depth) for name in (*variants, CONSTANT)}
    for seed in range(plan.seeds):
        fold = dealt(images, plan.folds, seed)
        for number in range(plan.folds):
            held_out, rest = (fold == number).nonzero().flatten(), (fold != number).nonzero().flatten()
            chooses = dealt([images[k] for k in rest.tolist()], round(1 / INNER_SHARE), seed) == 0
            for name, variant in variants.items():
                path = out / f"{name.replace(' ', '_')}-{seed}-{number}.safetensors"
                if not path.is_file():
                    config, mine = dressed(plan.config, variant, rounds)
                    head = fitted(config, mine, rest[~chooses], rest[chooses], plan, seed)
                    checkpoint.write_tensors(path, {"logits": said(head, mine, held_out)})
                sums[name][held_out] += load_file(str(path))["logits"] / plan.seeds
                done()
            base = Head(plan.config)
            base.fit_statistics({key: table[rest] for key, table in rounds.items()})
            joint = base.prior.clamp(1e-6, 1 - 1e-6)
            hazard = joint / torch.cat([torch.ones(1), joint[:-1]])
            sums[CONSTANT][held_out] += hazard.clamp(1e-6, 1 - 1e-6).logit() / plan.seeds
    return sums


def dressed(config: Config, variant: Variant, rounds: Mapping[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and the rounds of a variant."""
    mine, settings = dict(rounds), dict(variant.settings)
    for name in variant.blank:
        if name == "visual_scalars":
            mine["scalars"] = mine["scalars"].clone()
            mine["scalars"][:, VISUAL_SCALARS] = 0.0
        else:
            mine[name] = torch.zeros_like(mine[name])
    if variant.told:
        labels = [rounds["visual_mass"], rounds["dependence"].log1p().unsqueeze(1), rounds["changed"].unsqueeze(1)]
        mine["scalars"] = torch.cat([mine["scalars"], *labels], 1)
        settings["n_scalars"] = mine["scalars"].shape[1]
    return replace(config, **settings), mine


def fitted(config: Config, rounds: Mapping[str, Tensor], rows: Tensor, chooses: Tensor, plan: Plan, seed: int) -> Head:
    """A controller trained on some rows, as it was when it predicted those of `chooses` best."""
    torch.manual_seed(seed)
    head, optim = Head(config), plan.optim
    head.fit_statistics({name: table[rows] for name, table in rounds.items()})
    stepper = torch.optim.AdamW(head.parameters(), optim.lr, optim.betas, weight_decay=optim.weight_decay)
    best, kept = math.inf, {name: value.clone() for name, value in head.state_dict().items()}
    noise = torch.Generator().manual_seed(seed)
    size = min(optim.micro_batch * optim.accumulate, len(rows))
    for step in range(plan.steps):
        if step % LOOKS == 0:
            best, kept = _better(head, rounds, chooses, best, kept)
        picked = rows[torch.randperm(len(rows), generator=noise)[:size]]
        objective = head.forward({name: table[picked] for name, table in rounds.items()})
        stepper.param_groups[0]["lr"] = learning_rate(step, plan.steps, optim)
        stepper.zero_grad()
        (objective.loss / objective.count).backward()
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(head.parameters(), optim.clip)
        stepper.step()
    head.load_state_dict(_better(head, rounds, chooses, best, kept)[1])
    return head.eval()


@torch.no_grad()
def _better(
    head: Head, rounds: Mapping[str, Tensor], rows: Tensor, best: float, kept: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    now = float(head.forward({name: table[rows] for name, table in rounds.items()}).sums["survival_nll"])
    return (now, {name: value.clone() for name, value in head.state_dict().items()}) if now < best else (best, kept)


@torch.no_grad()
def said(head: Head, rounds: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Logits [len(rows), Dmax] of surviving each depth."""
    return head.look(*(rounds[name][rows] for name in ("last_hidden", "root_embed", "scalars"))).hazard


def logistic(features: Tensor, zero: Tensor, images: Sequence[str], folds: int) -> Tensor:
    """Nats [R] float64 of predicting `a = 0` by a logistic regression, each round by one of the other images.

    Args:
        features: [R, F].
        zero: [R] bool.
        images: of each round.
        folds: of the images.
    """
    fold, nats = dealt(images, folds, 0), torch.zeros(len(zero), dtype=torch.float64)
    target = zero.double()
    for number in range(folds):
        rest, held_out = fold != number, fold == number
        mean, std = features[rest].mean(0), features[rest].std(0).clamp_min(1e-6)
        x = ((features - mean) / std).double()
        weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss(rows: Tensor = rest, x: Tensor = x, weight: Tensor = weight, solver: Any = solver) -> Tensor:
            solver.zero_grad()
            logits = x[rows] @ weight[:-1] + weight[-1]
            value = F.binary_cross_entropy_with_logits(logits, target[rows]) + 1e-3 * weight[:-1].square().sum()
            value.backward()
            return value

        solver.step(loss)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            logits = x[held_out] @ weight[:-1] + weight[-1]
            nats[held_out] = F.binary_cross_entropy_with_logits(logits, target[held_out], reduction="none")
    return nats


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder these settings' own.

    Raises:
        InputError: it is another's.
    """
    path = out / "settings.json"
    out.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise InputError(f"--out {out} holds parts of another rollout or other settings; name another folder")
    else:
        checkpoint.write_json(path, settings)
