"""The number that counts: tau of the real decoding loop on held-out prompts, and what it looks like.

Invariant: tau here is what evaluation reports: kept tokens after the first one / rounds of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmspec.loop import all_complete, generate
from mmspec.policy import FixedPolicy
from mmspec.recipe import Recipe, Source
from mmspec.records import Quarantine, RecordError
from mmspec.sampling import GreedySampler
from mmspec.types import InputError, Output, Request, Target
from train.corpus import IMAGE_MARK, read
from train.placement import uneven
from train.stopping import Stopped, Stopper
from train.world import World

BATCH = 8


@dataclass(frozen=True)
class Measurement:
    """What the loop did on the held-out prompts.

    Args:
        tau: kept tokens after the first / rounds, over all ranks.
        by_topic: the same of the prompts of each topic that decoded more than one token.
        samples: (prompt, answer with accepted runs of tokens in ⟦ ⟧, tau) of this rank's first requests.
    """

    tau: float
    by_topic: dict[str, float]
    samples: list[tuple[str, str, float]]


@dataclass(frozen=True)
class HeldOut:
    """This rank's share of the held-out prompts, and what all ranks' are."""

    requests: tuple[Request, ...]
    questions: tuple[str, ...]
    topics: tuple[str, ...]
    """Of this rank's prompts, "" where a record has none."""
    all_topics: tuple[str, ...]
    """Of all ranks', without ""."""
    n_prompts: int
    """Of all ranks."""
    n_left_out: int
    """Records that cannot be used, or whose prompts are too long."""

    @property
    def described(self) -> str:
        """How many prompts these are, in words."""
        return f"{self.n_prompts} prompts" + (f" ({self.n_left_out} left out)" if self.n_left_out else "")


def held_out(recipe: Recipe, target: Target, world: World) -> HeldOut:
    """First turns of `run.eval_data`, every `world.size`-th for this rank. Every rank must call.

    Raises:
        InputError: on every rank, where nothing of it can be used.
    """
    corpus = read([Source(recipe.run.eval_data, limit=recipe.run.eval_prompts)], Quarantine(None))
    requests, questions, topics = [], [], []
    for index in range(world.rank, len(corpus), world.size):
        sample = corpus.samples[index]
        try:
            prompt = target.encode(sample.messages((), 1), sample.images())
        except (RecordError, ValueError):
            continue
        if len(prompt) < target.max_length:
            requests.append(Request(sample.id, prompt, recipe.run.eval_max_new_tokens, index))
            questions.append(sample.turns[0].replace(IMAGE_MARK, "").strip())
            topics.append(sample.topic)
    n_prompts = int(world.sum([len(requests)])[0])
    if not n_prompts:
        raise InputError(
            f"run.eval_data={recipe.run.eval_data}: none of its {corpus.n_read} prompts can be read within "
            f"{target.max_length} tokens; name other data"
        )
    everywhere = tuple(sorted({sample.topic for sample in corpus.samples} - {""}))
    n_left_out = corpus.n_read - n_prompts
    return HeldOut(tuple(requests), tuple(questions), tuple(topics), everywhere, n_prompts, n_left_out)


def measure(
    head: nn.Module, recipe: Recipe, target: Target, data: HeldOut, world: World, stopper: Stopper
) -> Measurement:
    """Decodes the held-out prompts. Every rank must call.

    Raises:
        Stopped: on every rank, when any was asked to stop.
    """
    policy = recipe.policy
    outputs: list[Output] = []
    try:
        with uneven(target):
            if data.requests:
                outputs = generate(
                    target,
                    data.requests,
                    head.drafter(target, policy.width),  # type: ignore[operator]
                    FixedPolicy(policy.depth, policy.budget),
                    GreedySampler(),
                    max_batch=BATCH,
                    on_output=lambda _: stopper.check(),
                )
                all_complete(outputs)
    except Stopped:
        pass
    target.free()
    stopper.check_together()
    # Those of a topic the ranks may not share: every rank adds up all of them.
    groups = [outputs]
    for topic in data.all_topics:
        groups.append([output for output, its in zip(outputs, data.topics) if its == topic])
    everywhere = world.sum([total for group in groups for total in _totals(group)]).reshape(-1, 2).tolist()
    by_topic = {topic: _tau(*totals) for topic, totals in zip(data.all_topics, everywhere[1:]) if totals[1]}
    samples = [
        (question, marked(target, output), _tau(*_totals([output])))
        for question, output in list(zip(data.questions, outputs))[: recipe.run.samples]
    ]
    return Measurement(_tau(*everywhere[0]), by_topic, samples)


def marked(target: Target, output: Output) -> str:
    """The answer with every run of accepted draft tokens in ⟦ ⟧; what stands outside the target decided itself."""
    text, at = [_piece(target, output.tokens, 0, 1)], 1
    for _, _, accepted, emitted in output.rounds:
        drafted = min(accepted, emitted)
        run = _piece(target, output.tokens, at, at + drafted)
        # An accepted stop token has no text.
        text.append(f"⟦{run}⟧" if run else "")
        text.append(_piece(target, output.tokens, at + drafted, at + emitted))
        at += emitted
    return "".join(text)


def _piece(target: Target, tokens: Sequence[int], start: int, end: int) -> str:
    """Text of tokens[start:end] in context: spaces belong to words, not to tokens alone."""
    return target.decode(tokens[:end])[len(target.decode(tokens[:start])) :]


def _totals(outputs: Sequence[Output]) -> tuple[float, float]:
    rounds: list[Any] = [entry for output in outputs for entry in output.rounds]
    return float(sum(entry[3] for entry in rounds)), float(len(rounds))


def _tau(kept: float, rounds: float) -> float:
    return kept / rounds if rounds else 1.0
