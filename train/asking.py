"""How a question is put to the target: with which instruction, up to which length, greedily or by sampling.

Invariant: all of it is a function of the settings and of the sample's place in the corpus. With noise that is keyed by
that place, too, an answer depends neither on the batch it was decoded in, nor on process, restart or drafter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mmspec.recipe import Data, Instruction
from mmspec.sampling import GreedySampler, KeyedSampler
from train.corpus import Corpus, Sample, Samples


def is_sampled(data: Data, index: int) -> bool:
    """Whether the answers of a sample are sampled. With a larger share more are, and those that were still are."""
    return _chance("sampled", data.answer_seed, index) < data.sampled_share


def instruction_of(data: Data, index: int) -> Instruction | None:
    """What a sample is asked for besides, if anything."""
    chance = _chance("instruction", data.answer_seed, index)
    for instruction in data.instructions:
        chance -= instruction.share
        if chance < 0:
            return instruction
    return None


def answer_limit(data: Data, index: int) -> int:
    """Tokens that an answer of a sample may have."""
    instruction = instruction_of(data, index)
    return (instruction and instruction.max_new_tokens) or data.max_new_tokens


def sampler_of(data: Data, sampled: bool) -> GreedySampler | KeyedSampler:
    """What chooses the tokens; requests are keyed by the sample's place."""
    if not sampled:
        return GreedySampler()
    return KeyedSampler(data.temperature, top_p=data.top_p, seed=data.answer_seed)


def settings(data: Data, limit: int) -> dict[str, Any]:
    """What answers depend on beside target and corpus; what has no effect is left out.

    Args:
        limit: tokens of the longest conversation.
    """
    found: dict[str, Any] = {"answers": data.answers, "max_length": limit}
    if data.answers != "regenerated":
        return found
    found |= {"max_new_tokens": data.max_new_tokens, "drop": sorted(set(data.drop))}
    if data.sampled_share:
        found |= {"sampled_share": data.sampled_share, "temperature": data.temperature, "top_p": data.top_p}
    if data.instructions:
        found["instructions"] = [[one.text, one.share, one.max_new_tokens] for one in data.instructions]
    if data.sampled_share or data.instructions:
        found["answer_seed"] = data.answer_seed
    return found


def instructed(corpus: Corpus, data: Data) -> Corpus:
    """The corpus as the target is asked: instructions stand behind the first questions."""
    if not any(instruction.text for instruction in data.instructions):
        return corpus
    return replace(corpus, samples=_Instructed(corpus.samples, data))


class _Instructed(Samples):
    """Samples with their instructions, put in when a sample is asked for."""

    def __init__(self, samples: Samples, data: Data) -> None:
        super().__init__(samples.parts)
        self._data = data

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        # Those of a slice have come this way one by one.
        return found if isinstance(index, slice) else self._ask(found, index % len(self))

    def __iter__(self) -> Iterator[Sample]:
        return (self._ask(sample, index) for index, sample in enumerate(super().__iter__()))

    def _ask(self, sample: Sample, index: int) -> Sample:
        instruction = instruction_of(self._data, index)
        if instruction is None or not instruction.text:
            return sample
        return replace(sample, turns=(f"{sample.turns[0]}\n{instruction.text}", *sample.turns[1:]))


def chunks(corpus: Corpus, data: Data, size: int) -> Sequence[Sequence[int]]:
    """The samples whose answers are made together, at most `size` each.

    Conversations of a kind together: later turns then still fill a batch. It depends on corpus and settings alone, so
    that a chunk is decoded in the same batches however often it was begun.
    """
    kinds = [(n, is_sampled(data, index)) for index, n in enumerate(corpus.samples.turns.tolist())]
    ordered = sorted(range(len(kinds)), key=kinds.__getitem__)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _chance(what: str, seed: int, index: int) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(f"{what}/{seed}/{index}".encode()).digest()[:8]) / 2**64
