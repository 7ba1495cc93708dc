"""transformers' `generate` with a Speculator inside: its own tokens for its own arguments, or one line that refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mmspec.api import Speculator
from mmspec.drafters.null import NullDrafter
from mmspec.methods import make_method
from mmspec.policy import SkipPolicy
from mmspec.types import InputError
from tests import tiny
from tests.families import FAMILIES, build, inputs, prompt, twin

NEW = 16


def drafting(target: Any) -> Speculator:
    """Copies from the context, so that a random model has drafts that are accepted and drafts that are not."""
    return Speculator(target, *make_method("pld", target, {"max_ngram": 2}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["none", "first", "two"])
def test_generate_gives_the_models_own_tokens(family, layout):
    target = build(family)
    given = inputs(prompt(target, 3, layout))
    for more in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}):
        theirs = twin(target, "sdpa").generate(**given, max_new_tokens=NEW, **more)
        mine = target.model.generate(
            **given, max_new_tokens=NEW, custom_generate=drafting(target).custom_generate(), **more
        )
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["none", "first"])
def test_rows_are_padded_as_generate_pads(family, layout):
    """Rows of unequal length, padded on the left, each with its own picture; one row ends sooner than the other."""
    target = build(family)
    single = [inputs(prompt(target, seed, layout, n)) for seed, n in ((3, 4), (5, 9))]
    longest = max(row["input_ids"].shape[1] for row in single)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.cat(
            [torch.nn.functional.pad(r[name], (longest - r[name].shape[1], 0), value=value) for r in single]
        )

    pad = int(target.model.generation_config.pad_token_id or 0)
    given = {"input_ids": padded("input_ids", pad), "attention_mask": padded("attention_mask", 0)}
    for name in ("pixel_values", "image_sizes", "image_grid_thw"):
        parts = [row[name] for row in single if name in row]
        if parts and name == "pixel_values" and parts[0].dim() == 5:  # tiles, as the processor stacks them
            most = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 0, 0, most - part.shape[1])) for part in parts]
        given |= {name: torch.cat(parts)} if parts else {}
    generate = drafting(target).custom_generate()
    mine = target.model.generate(**given, max_new_tokens=NEW, custom_generate=generate)
    assert torch.equal(mine[:, :longest], given["input_ids"])
    for row, alone in enumerate(single):
        theirs = twin(target, "sdpa").generate(**alone, max_new_tokens=NEW)[0, alone["input_ids"].shape[1] :].tolist()
        assert mine[row, longest:].tolist() == theirs + [pad] * (mine.shape[1] - longest - len(theirs))


def test_sampled_text_follows_torchs_seed_and_not_the_drafter():
    target = tiny.llava()
    given = inputs(tiny.prompt(target, 1))
    plain = Speculator(target, NullDrafter(), SkipPolicy())

    def sampled(model: Speculator, seed: int) -> list[int]:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "max_new_tokens": NEW}
        return target.model.generate(**given, custom_generate=model.custom_generate(), **how)[0].tolist()

    assert sampled(drafting(target), 1) == sampled(plain, 1)
    assert sampled(plain, 1) != sampled(plain, 2)


def test_a_callers_own_processors_and_limit_count_and_not_the_configurations():
    target = tiny.llava()
    given = inputs(tiny.prompt(target, 1))
    longest = given["input_ids"].shape[1] + NEW
    how = {
        "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]),
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(longest)]),
    }
    theirs = twin(target, "sdpa").generate(**given, **how)
    mine = target.model.generate(**given, custom_generate=drafting(target).custom_generate(), **how)
    assert torch.equal(mine, theirs)


def test_a_streamer_is_told_prompt_and_tokens_once():
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended += 1

    target, streamer = tiny.llava(), Streamer()
    given = inputs(tiny.prompt(target, 1))
    generate = drafting(target).custom_generate(streamer)
    whole = target.model.generate(**given, max_new_tokens=NEW, custom_generate=generate)
    assert (streamer.tokens, streamer.ended) == (whole[0].tolist(), 1)


def test_the_speculators_own_generate_takes_the_same_penalties():
    target = tiny.llava()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2 w3"}]}]
    given = inputs(target.encode(messages, [tiny.image(4)]))
    how = {"max_new_tokens": NEW, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    answer = drafting(target).generate([messages], [tiny.image(4)], **how)[0]
    theirs = twin(target, "sdpa").generate(**given, **how)[0, given["input_ids"].shape[1] :]
    assert answer.output.tokens == theirs.tolist()


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences=2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"logits_processor": LogitsProcessorList([Nothing()])}, "Nothing is no processor"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper is no processor"),
        ({"stopping_criteria": StoppingCriteriaList([Never()])}, "Never is no criterion"),
        ({"eos_token_id": 7}, r"eos_token_id=\[7\]"),
    ],
)
def test_what_the_loop_does_not_have_is_refused(how, said):
    target = tiny.llava()
    given = inputs(tiny.prompt(target, 1))
    generate = drafting(target).custom_generate()
    with pytest.raises(InputError, match=said) as raised:
        target.model.generate(**given, max_new_tokens=4, custom_generate=generate, **how)
    assert "\n" not in str(raised.value)


def test_pictures_that_cannot_be_told_apart_and_other_models_are_refused():
    target = tiny.llava()
    generate = drafting(target).custom_generate()
    given = inputs(tiny.prompt(target, 1, images=2))
    two = {name: torch.cat([value, value]) for name, value in given.items()}
    with pytest.raises(InputError, match="4 pictures for 2 rows"):
        target.model.generate(**two, max_new_tokens=4, custom_generate=generate)
    with pytest.raises(InputError, match="another model"):
        twin(target, "sdpa").generate(**given, max_new_tokens=4, custom_generate=generate)
