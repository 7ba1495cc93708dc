"""Does vision help to predict draftability, per topic? Controllers that lack one thing each, on one stored rollout.

    python train/distill.py recipes/viskip_only_eagle_tiny.yaml policy.controller.counterfactual=mean
    python scripts/ablate_viskip.py runs/viskip_only_eagle_tiny
    python scripts/ablate_viskip.py runs/viskip_llava7b --out runs/science_llava7b --folds 5 --seeds 1

RUN is a finished run whose rollout has labels of visual attention and of dependence. Trained on it are: the whole
controller, scalars alone, without visual heads, without each loss term and each input, with visual heads that survival
does not shape, and one that is told the labels, which nobody knows when decoding. Images are dealt into folds, and each
round is predicted by controllers that saw none of its image; every controller is the one of its training that predicted
a further share of the images best. Nothing is decoded.

Written: --results/science.json and science.md with nats a round, AUC of a = 0, calibration by depth, all by topic, with
paired bootstrap intervals by image and Holm's correction, and the answer in words. Interrupted, the same command goes
on: finished trainings are kept in --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
# As in train/distill.py: no more threads than cores.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from mmspec.arguments import Parser, at_least, command  # noqa: E402
from mmspec.recipe import load  # noqa: E402
from mmspec.types import InputError  # noqa: E402
from train.distill import leave, train  # noqa: E402

if TYPE_CHECKING:
    from train.session import Session

BASE = ("entropy", "accepted_share_ema_fast", "log_committed", "log_generated")
"""What the logistic regression knows of a round besides vision."""
LEFT_OUT = {
    "no visual heads": "the visual heads",
    "no visual labels": "the labels of the visual heads, which stay as capacity",
    "told the labels": "being told the labels themselves, which only hindsight knows",
}
LOGISTIC = (
    f"Known: {', '.join(BASE)}. Added: attention r of the last layer and log(1 + dependence) c, once of the position "
    "that chose the root (`now`: known, c at the price of a second pass), once of the next four (`next`: known in "
    "hindsight only)."
)


@command("ablate_viskip")
def main() -> int:
    """The command; returns the exit code."""
    arguments = _parse()
    path = arguments.run / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{arguments.run} is no run folder (no recipe.yaml); train one with train/distill.py")
    recipe = load(path)
    recipe.run.out, recipe.run.name = str(arguments.run.parent), arguments.run.name
    recipe.data.features = ""
    return train(recipe, instead=lambda session: ablate(session, arguments), answer=False)


def ablate(session: Session, arguments: argparse.Namespace) -> None:
    """Trains what is missing, and writes the figures."""
    import torch

    from eval.science import Rounds, compared, figures, markdown, survival_nll
    from eval.summary import OVERALL, clean, hardware
    from mmspec import checkpoint
    from train.ablate import VARIANTS, WHOLE, Plan, claim, logistic, predictions, read_rounds

    policy, target = session.recipe.policy, session.target
    rounds = read_rounds(arguments.run)
    rounds["last_hidden"] = rounds["last_hidden"].float()
    rounds["root_embed"] = target.embed(rounds["root"].to(target.device)).detach().float().cpu()
    topics, images = _shown(session, rounds["key"].tolist())
    config = policy.controller.resolve(target.shape)
    plan = Plan(config, policy.optim, arguments.steps or policy.steps, arguments.folds, arguments.seeds)
    claim(arguments.out, {**_plain(plan), "rounds": _digest(rounds)})
    session.tracker.progress("controllers", len(VARIANTS) * plan.folds * plan.seeds, 0, "controller")

    def done() -> None:
        session.tracker.advance()
        session.stopper.check()

    logits = predictions(rounds, images, plan, arguments.out, VARIANTS, done)
    session.tracker.end_progress()
    seen = Rounds(rounds["accepted"], rounds["reach"], topics, images)
    nats = {name: survival_nll(said, seen.accepted, seen.reach) for name, said in logits.items()}
    others = {name: (nats[WHOLE], nats[name]) for name in logits if name not in (WHOLE, "told the labels")}
    vision = {name: (nats[WHOLE], nats[name]) for name in ("no visual heads", "no visual labels")}
    vision["told the labels"] = (nats["told the labels"], nats[WHOLE])
    seed = session.recipe.run.seed
    compare = {
        "ablations": compared(others, seen, [OVERALL], seed),
        "vision": compared(vision, seen, seen.names(), seed),
        "logistic": compared(_regressions(rounds, images, plan.folds, logistic), seen, seen.names(), seed),
    }
    labels, rank_names = _labels(rounds, seen)
    machine = hardware(target.device)
    found: dict[str, Any] = {
        "command": f"python scripts/ablate_viskip.py {' '.join(map(checkpoint.discreet, sys.argv[1:]))}",
        "commit": checkpoint.git_commit(),
        "hardware": machine,
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
        "how": _how(plan, seen, target.name),
        "logistic_how": LOGISTIC,
        "models": [{"model": n, "topic": t, **figures(x, seen, t)} for n, x in logits.items() for t in seen.names()],
        **compare,
        "labels": labels,
        "rank_names": rank_names,
        "settings": _plain(plan),
    }
    found["answer"] = _answer(found)
    arguments.results.mkdir(parents=True, exist_ok=True)
    page = markdown(found)
    checkpoint.write_json(arguments.results / "science.json", clean(found))
    (arguments.results / "science.md").write_text(page, encoding="utf-8")
    assert torch.isfinite(nats[WHOLE]).all()
    session.tracker.say("\n".join(found["answer"]))
    session.tracker.say(f"written: {arguments.results}/science.json and science.md")


def _shown(session: Session, keys: list[int]) -> tuple[list[str], list[str]]:
    """Topic and image of each round; text alone is its own image."""
    of: dict[int, tuple[str, str]] = {}
    for key in set(keys):
        sample = session.corpus.samples[key]
        of[key] = (sample.topic or "no topic", sample.image_name() or f"text {key}")
    topics, images = zip(*(of[key] for key in keys))
    return list(topics), list(images)


def _regressions(rounds: Any, images: list[str], folds: int, logistic: Any) -> dict[str, Any]:
    """Nats of a = 0 with vision and without, by which vision is added."""
    import torch

    from mmspec.policy import SCALARS

    zero = rounds["accepted"] == 0
    base = rounds["scalars"][:, [SCALARS.index(name) for name in BASE]].float()
    without = logistic(base, zero, images, folds)
    found = {}
    for when, end in (("now", "_now"), ("next", "")):
        mass, dependence = rounds[f"visual_mass{end}"][:, -1:], rounds[f"dependence{end}"].log1p().unsqueeze(1)
        for what, more in (("r", [mass]), ("c", [dependence]), ("r and c", [mass, dependence])):
            found[f"{what} {when}"] = (logistic(torch.cat([base, *more], 1), zero, images, folds), without)
    return found


def _labels(rounds: Any, seen: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """How labels are distributed by topic, and the rank correlation of dependence with attention and with a = 0."""
    from mmspec.metrics import rank_correlation

    rows, n_mass = [], rounds["visual_mass"].shape[1]
    for topic in seen.names():
        mine = seen.of(topic)
        mine = mine[rounds["dependence_valid"][mine] & rounds["visual_mass_valid"][mine]]
        dependence = rounds["dependence"][mine]
        others = [rounds["visual_mass"][mine, k] for k in range(n_mass)] + [(seen.accepted[mine] == 0).float()]
        ranks = [rank_correlation(dependence, other) for other in others]
        figures = {"dependence": float(dependence.mean()), "changed": float(rounds["changed"][mine].mean())}
        rows.append({"topic": topic, "n": len(mine), **figures, "ranks": ranks})
    names = [f"rank correlation of KL with attention, layer {k + 1} of {n_mass}" for k in range(n_mass)]
    return rows, [*names, "rank correlation of KL with a = 0"]


def _answer(found: dict[str, Any]) -> list[str]:
    """The question of D6 in words, whichever way it falls."""
    from eval.science import answer, verdict
    from eval.summary import OVERALL

    by = {name: [row for row in found["vision"] if row["without"] == name] for name in LEFT_OUT}
    heads, told = by["no visual heads"][0], by["told the labels"][0]  # over all topics
    now = next(r for r in found["logistic"] if r["without"] == "r and c now" and r["topic"] == OVERALL)
    known = next(row for row in found["ablations"] if row["without"] == "constant")["gain"]
    if verdict(heads) == "helps":
        first = (
            "Yes, by this much: of what the controller knows beyond the mean of each depth "
            f"{heads['gain'] / known:.1%} is lost without distilled visual heads: {heads['gain']:.4f} of {known:.4f} "
            "nats a round."
        )
    elif verdict(told) == "helps":
        first = (
            "No, not as it can be known: visual heads add nothing that is found here, though a controller that is told "
            "the labels in hindsight predicts better. The deployed one is a gate of general difficulty."
        )
    else:
        first = (
            "No: visual heads add nothing that is found here, and not even the labels themselves do, told in "
            "hindsight. The controller is a gate of general difficulty, and should be described as such."
        )
    simple = f"In a logistic regression of a = 0 on scalars, r and c of now: {verdict(now)} ({now['gain']:+.4f} nats)."
    return [first, simple, *(line for name, what in LEFT_OUT.items() for line in answer(by[name], what))]


def _how(plan: Any, seen: Any, target: str) -> str:
    batch = plan.optim.micro_batch * plan.optim.accumulate
    return (
        f"{len(seen.accepted)} rounds of {len(set(seen.images))} images on {target}, {plan.folds} folds by image, mean "
        f"logits of {plan.seeds} seeds, at most {plan.steps} steps of {batch} rounds. A gain is what the model without "
        "it needs more, in nats a round of held-out survival likelihood; intervals are of a paired bootstrap over "
        "images, p after Holm within a table."
    )


def _plain(plan: Any) -> dict[str, Any]:
    said: dict[str, Any] = dataclasses.asdict(plan)
    said["optim"]["betas"] = list(said["optim"]["betas"])
    return said


def _digest(rounds: Any) -> str:
    state = hashlib.sha256()
    for name in sorted(rounds):
        state.update(name.encode() + rounds[name].contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def _parse() -> argparse.Namespace:
    parser = Parser(prog="scripts/ablate_viskip.py", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder with a labelled rollout")
    add("--out", type=Path, default=Path("runs/science"), metavar="DIR", help="finished parts (default: %(default)s)")
    results = Path("recipes/results/science")
    add("--results", type=Path, default=results, metavar="DIR", help="science.json, science.md (default: %(default)s)")
    add("--folds", type=int, default=5, metavar="N", help="parts of the images, each held out once (default: 5)")
    add("--seeds", type=int, default=3, metavar="N", help="trainings whose logits are averaged (default: 3)")
    add("--steps", type=int, metavar="N", help="of each training (default: the recipe's policy.steps)")
    arguments = parser.parse_args()
    at_least(arguments, folds=2, seeds=1, steps=1)
    return arguments


if __name__ == "__main__":
    leave(main())
