"""EAGLE-3's own: which states it reads, what it feeds back, its vocabulary, and what a checkpoint of it holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmspec import checkpoint
from mmspec.drafters.null import NullDrafter
from mmspec.heads.eagle3 import Config, Head, draft_vocabulary
from mmspec.loop import generate
from mmspec.losses import LossConfig
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.targets import load_target
from mmspec.types import InputError, Request
from tests.drafters import DRAFT_VOCAB, make_head
from tests.tiny import VOCAB, llava, prompt


def shape(n_layers):
    return dataclasses.replace(llava().shape, n_layers=n_layers)


# ---- the states it reads ----


@pytest.mark.parametrize(("layers", "taps"), [(32, (2, 16, 29)), (28, (2, 14, 25)), (12, (2, 6, 9)), (3, (0, 1, 2))])
def test_default_taps_are_low_middle_and_high(layers, taps):
    assert Config().resolve(shape(layers)).taps == taps


def test_taps_are_indices_into_the_models_own_hidden_states():
    """Not 0, 1, 2, which in a model that returns all its states are the embeddings and the first layers."""
    target = load_target("tiny_llava", "float32", "cpu")
    head = Head(Config().resolve(target.shape))
    assert head.taps == (2, 6, 9)
    asked = target.encode([{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}], [])
    forward = target.prefill(target.open(1, 64), 0, asked, head.taps)
    with torch.no_grad():
        theirs = target.model(input_ids=asked.input_ids[None], output_hidden_states=True).hidden_states
    expected = torch.cat([theirs[tap] for tap in (2, 6, 9)], -1)
    assert torch.allclose(head.read(forward), expected, atol=1e-5)
    features = target.teacher([asked], [torch.zeros(len(asked), dtype=torch.long)], head.taps)
    assert torch.allclose(head.read(features), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"taps": (2, 3)}, "3 different indices"),
        ({"taps": (1, 1, 2)}, "3 different indices"),
        ({"draft_vocab_size": -1}, "at least 0"),
        ({"image_input": "compressed"}, "knows embeds, aux, none"),
        ({"rope": "2d"}, "knows 1d, mrope"),
    ],
)
def test_impossible_settings_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Config(**values)


def test_settings_that_the_target_cannot_meet_are_refused():
    for taps in ((1, 2, 3), (-1, 0, 1)):
        with pytest.raises(InputError, match=r"0\.\.2"):
            Config(taps=taps).resolve(shape(3))
    with pytest.raises(InputError, match="62"):
        Config(draft_vocab_size=62).resolve(shape(3))
    with pytest.raises(InputError, match=r"loss\.regression"):
        Head(Config().resolve(shape(3)), LossConfig(regression=0.1))


# ---- what it feeds back ----


def test_recurrence_is_told_by_its_source_and_not_by_its_width():
    """Each pass of a draft enters target states once through W_fc; the block's own outputs go past it."""
    target = llava()
    drafter = make_head("eagle3", target).drafter(target, 2)
    calls = []
    drafter.head.fc.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[-1]))
    passes = []
    drafter.head.block.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    outputs = generate(target, [Request("r", prompt(target, 1), 12)], drafter, FixedPolicy(4, 6), GreedySampler())
    rounds = sum(action == "draft" for action, *_ in outputs[0].rounds)
    assert len(calls) == rounds + 1  # and once for the prompt
    assert set(calls) == {3 * target.shape.hidden_size}
    assert len(passes) > 2 * rounds


def test_the_block_reads_both_halves_and_carries_the_state_alone():
    head = make_head("eagle3", llava())
    width = head.config.hidden_size
    assert head.block.q_proj.in_features == head.block.v_proj.in_features == 2 * width
    with torch.no_grad():
        head.block.o_proj.weight.zero_()
        head.block.mlp.down_proj.weight.zero_()
        embeds, states = torch.randn(2, 1, 5, width, dtype=torch.float64)
        rope = head.rotary.span(0, 5, states)
        out = head.block(head.pair(embeds, states), rope, lambda q, k, v: torch.zeros_like(q))
    assert torch.equal(out, states)


def test_logits_are_of_the_normed_state_and_the_fed_back_one_is_not_normed():
    target = llava()
    head = make_head("eagle3", target)
    state = torch.randn(1, 1, head.config.hidden_size, dtype=torch.float64)
    expected = (state / (state.square().mean() + head.config.rms_eps).sqrt()) @ head.lm_head.weight.T
    assert torch.allclose(head.logits(state, target.unembed), expected)
    assert torch.equal(head.pair(state, state)[..., -head.config.hidden_size :], state)


# ---- its vocabulary ----


def test_the_draft_vocabulary_is_the_most_frequent_tokens_and_those_that_must_be_in():
    target = load_target("tiny_llava", "float32", "cpu")
    counts = torch.zeros(target.shape.vocab_size)
    counts[700:900] = torch.arange(200.0) + 1
    counts[target.image_token_id] = 1e9
    ids = draft_vocabulary(counts, 150, target)
    texts = {target.decode([i]).strip() for i in ids.tolist()}
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert len(ids) == 150
    assert set("0123456789.,:;!?-()") <= texts
    assert target.stop_ids <= set(ids.tolist())
    assert target.image_token_id not in ids
    chosen = [i for i in ids.tolist() if counts[i] > 0]
    assert chosen == list(range(900 - len(chosen), 900))
    with pytest.raises(InputError, match="too small"):
        draft_vocabulary(counts, 5, target)


def test_its_unembedding_starts_as_the_targets_own_rows():
    target = llava()
    for kind in ("eagle3", "eagle3_small"):
        head = make_head(kind, target)
        head.prepare(target, lambda: torch.arange(VOCAB))
        ids = torch.arange(VOCAB) if head.draft_ids is None else head.draft_ids
        assert torch.equal(head.lm_head.weight, target.lm_head.weight[ids])
        assert target.image_token_id not in ids or head.draft_ids is None


def test_a_token_outside_the_draft_vocabulary_has_no_loss_and_is_a_miss():
    target = llava()
    head = make_head("eagle3_small", target)
    asked = prompt(target, 3, 8)
    features = target.teacher([asked], [torch.ones(len(asked), dtype=torch.long)], head.taps)
    best = target.unembed(features.last_hidden[0]).argmax(-1)[1:-1]
    covered = torch.isin(best, head.draft_ids)
    assert 0 < covered.sum() < len(covered)  # or there is nothing to see
    objective = head(features, target.unembed)
    assert int(objective.counts["top1"]) == len(covered)
    assert int(objective.sums["covered"]) == int(covered.sum())
    assert int(objective.count) == len(covered)  # known from the marks, before any forward pass
    # A target that only ever says what is outside: nothing to learn, nothing right.
    outside = next(i for i in range(VOCAB) if i not in head.draft_ids)

    def stubborn(hidden):
        return target.unembed(hidden).index_fill(-1, torch.tensor(outside), 1e4)

    objective = head(features, stubborn)
    assert float(objective.loss.detach()) == float(objective.sums["pos_1"]) == 0
    assert float(objective.counts["pos_1"]) == len(covered)


def test_only_tokens_of_the_draft_vocabulary_are_drafted():
    target = llava()
    drafter = make_head("eagle3_small", target).drafter(target, 3)
    drafted = set()

    class Watched:
        def __getattr__(self, name):
            return getattr(drafter, name)

        def propose(self, roots, plan):
            tree = drafter.propose(roots, plan)
            drafted.update(tree.tokens[tree.parents >= 0].tolist())
            return tree

    wanted = [Request(f"r{i}", prompt(target, i), 20, i) for i in range(4)]
    got = generate(target, wanted, Watched(), FixedPolicy(4, 9), GreedySampler(), max_batch=2)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())
    assert [o.tokens for o in got] == [o.tokens for o in plain]
    assert drafted <= set(drafter.head.draft_ids.tolist())
    assert any(token >= DRAFT_VOCAB for token in drafted)  # ids, not places in the vocabulary


# ---- checkpoints ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = llava(dtype="float32")
    head = make_head("eagle3_small", target).float()
    checkpoint.save_head(tmp_path, head.state_dict(), head.config, target)
    checkpoint.save_tree(tmp_path, checkpoint.DraftTree(4, 2, 6))
    return tmp_path


def test_a_checkpoint_holds_the_draft_vocabulary_and_the_taps(folder: Path):
    target = llava(dtype="float32")
    head = make_head("eagle3_small", target)
    loaded = checkpoint.load(folder)
    assert loaded.kind == "eagle3"
    assert loaded.config == head.config
    assert loaded.config.taps == (0, 1, 2)
    again = loaded.head(torch.bfloat16)
    assert torch.equal(again.draft_ids, head.draft_ids)
    assert again.lm_head.weight.dtype == torch.bfloat16
    names = set(load_file(folder / "head.safetensors"))
    assert names == {
        "draft_ids", "fc.weight", "norm.weight", "lm_head.weight",
        *(f"block.{name}_proj.weight" for name in "qkvo"),
        *(f"block.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"block.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
    }  # fmt: skip


@pytest.mark.parametrize("taps", [[], [1, 2, 3]])
def test_a_checkpoint_without_taps_or_with_impossible_ones_is_refused(folder: Path, taps):
    said = json.loads((folder / "head.json").read_text())
    said["config"]["taps"] = taps
    (folder / "head.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"taps|damaged"):
        checkpoint.load(folder)
