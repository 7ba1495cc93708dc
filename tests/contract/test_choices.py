"""Whatever decides tokens beside the logits (penalties, shared noise, rejection): the output is the target's own."""

from __future__ import annotations

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import make_sampler
from mmspec.tree import from_parents
from mmspec.types import Request
from tests.contract.test_loop import drafters, requests
from tests.tiny import VOCAB, llava, prompt

PENALTIES = {"repetition_penalty": 1.05, "no_repeat_ngram": 3}
SAMPLERS = {
    "greedy": make_sampler(0.0, **PENALTIES),
    "sampled": make_sampler(0.8, top_p=0.9, seed=3, **PENALTIES),
}


class RandomTrees(NullDrafter):
    """Trees of any shape with any tokens, siblings distinct, and padding."""

    def open(self, max_batch, max_tokens):
        self.rng = torch.Generator().manual_seed(5)

    def draw(self, high):
        return int(torch.randint(high, (1,), generator=self.rng))

    def propose(self, roots, plan):
        N = max(plan.budget) + 1
        tokens, parents, depths = roots[:, None].repeat(1, N), torch.full((len(roots), N), -1), [0] * N
        for b, budget in enumerate(plan.budget):
            for i in range(1, budget + 1):
                parent = self.draw(i)
                if depths[parent] == plan.depth:
                    parent = 0
                parents[b, i], depths[i] = parent, depths[parent] + 1
                siblings = {int(tokens[b, j]) for j in range(1, i) if int(parents[b, j]) == parent}
                tokens[b, i] = next(t for t in iter(lambda: self.draw(VOCAB), None) if t not in siblings)
        return from_parents(tokens, parents, plan.depth)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_penalised_text_is_plain_decodings_under_every_drafter(sampler):
    target, draw = llava(), SAMPLERS[sampler]
    wanted = requests(target, n=6, new=28)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), draw)
    free = generate(target, wanted, NullDrafter(), SkipPolicy(), make_sampler(0.0 if sampler == "greedy" else 0.8))
    assert [o.tokens for o in plain] != [o.tokens for o in free]  # or nothing was penalised
    truth = {tuple(r.prompt.input_ids.tolist()): o.tokens for r, o in zip(wanted, plain)}
    for name, drafter in {**drafters(target, truth), "random_trees": RandomTrees()}.items():
        for batch in (1, 4):
            got = generate(target, wanted, drafter, FixedPolicy(4, 9), draw, max_batch=batch)
            assert [o.tokens for o in got] == [o.tokens for o in plain], (name, batch)


@pytest.mark.parametrize(("repetition", "ngram"), [(1.05, 0), (1.0, 3), (1.3, 2), (1.05, 3)])
def test_penalised_plain_decoding_is_the_models_own_generate(repetition, ngram):
    target = llava()
    request = Request("r", prompt(target, 5, images=1), 60)
    draw = make_sampler(0.0, repetition_penalty=repetition, no_repeat_ngram=ngram)
    ours = generate(target, [request], NullDrafter(), SkipPolicy(), draw)[0].tokens
    ids = request.prompt.input_ids[None]
    pixels = {k: v.double() for k, v in request.prompt.pixels.items()}
    theirs = target.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=60,
        do_sample=False,
        repetition_penalty=repetition,
        no_repeat_ngram_size=ngram,
        **pixels,
    )[0, ids.shape[1] :].tolist()
    assert theirs == ours
    free = generate(target, [request], NullDrafter(), SkipPolicy(), make_sampler(0.0))[0].tokens
    assert ours != free
