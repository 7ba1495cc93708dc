"""Vision-blind twins: what is shown of the image changes nothing that they read, in training and drafting alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmspec import checkpoint
from mmspec.api import make_drafter
from mmspec.heads._blind import BlindHead, blind_twin, image_means
from mmspec.heads._drafter import PairHead
from mmspec.heads._objective import SteppedHead
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.recipe import head_kinds, import_head
from mmspec.sampling import GreedySampler
from mmspec.types import Plan, Prompt, Request
from tests import training
from tests.contract.test_heads import dialogue, taught
from tests.tiny import image, llava, prompt

KINDS = head_kinds()


def twin(kind: str, target) -> BlindHead:
    """An untrained twin with means of no particular value, in the target's dtype."""
    torch.manual_seed(3)
    module = import_head(kind)
    built = blind_twin(module.Head)(module.Config().resolve(target.shape))
    assert isinstance(built, BlindHead)
    built.means.normal_()
    return built.to(target.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_nothing_at_image_positions(kind):
    """States and embeddings of another image at image positions give the same loss; at text positions they do not."""
    target = llava()
    blind = twin(kind, target)
    features = taught(target, blind, [dialogue(target), dialogue(target, images=2)])
    losses = []
    for places in (features.visual & False, features.visual, features.valid & ~features.visual):
        shift = places.unsqueeze(-1) * torch.randn_like(features.embeds)
        other = replace(
            features,
            embeds=features.embeds + shift,
            last_hidden=features.last_hidden + shift,
            hidden={tap: states + shift for tap, states in features.hidden.items()},
        )
        losses.append(blind.forward(other, target.unembed).loss.item())
    assert losses[1] == losses[0]
    assert losses[2] != losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_reads_nothing_at_image_positions(kind):
    """A drafter that is shown a prefill with other states at image positions proposes the same tree."""
    target = llava()
    blind, module = twin(kind, target), import_head(kind)
    torch.manual_seed(3)
    seeing = module.Head(module.Config().resolve(target.shape)).to(target.dtype)
    asked = prompt(target, 4)
    with torch.inference_mode():
        forward = target.prefill(target.open(1, 64), 0, asked, blind.taps)
        for head in (blind, seeing):
            trees = []
            for scale in (0.0, 3.0):
                shift = forward.visual.unsqueeze(-1) * scale * torch.randn_like(forward.embeds)
                hidden = {tap: states + shift for tap, states in forward.hidden.items()}
                last = forward.last_hidden + shift
                shown = replace(forward, embeds=forward.embeds + shift, last_hidden=last, hidden=hidden)
                drafter = head.drafter(target, 2)
                drafter.open(1, 64)
                drafter.admit(0, Request("r", asked, 8), shown, torch.tensor(9))
                trees.append(drafter.propose(torch.tensor([9]), Plan(2, (4,), prune=lambda tree: tree)))
            assert head is not blind or torch.equal(trees[0].tokens, trees[1].tokens)
            same = trees[0].scores is None or torch.equal(trees[0].scores, trees[1].scores)
            if head is blind:
                assert same
            elif isinstance(head, PairHead):  # others may read the newest state alone
                assert not same


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_drafts_as_it_was_trained(kind):
    """Its scores of the first draft token are the unrolled ones of its own training forward (fp64)."""
    target = llava()
    blind = twin(kind, target).eval().requires_grad_(False)
    assert isinstance(blind, SteppedHead)
    whole, _ = dialogue(target, n_turns=1)
    cut = len(whole) - 4
    with torch.inference_mode():
        marks = torch.zeros(len(whole), dtype=torch.long)
        marks[int(whole.visual.nonzero().max()) + 2 :] = 1  # all text behind the image, as if it were a reply
        features = blind.blindfold(target.teacher([whole], [marks], blind.taps))
        packed, outputs = blind.unroll(features, 1)
        at = packed.tokens[packed.drafts].tolist().index(cut - 1)
        log_q = blind.step_logits(0, outputs[0][at], target.unembed).log_softmax(-1)
        prefix = Prompt(whole.input_ids[:cut], whole.visual[:cut], whole.pixels)
        forward = target.prefill(target.open(1, 64), 0, prefix, blind.taps)
        drafter = blind.drafter(target, 3)
        drafter.open(1, 64)
        drafter.admit(0, Request("r", prefix, 8), forward, whole.input_ids[cut])
        tree = drafter.propose(whole.input_ids[cut : cut + 1], Plan(1, (3,)))
    best = log_q.topk(3)
    assert sorted(tree.tokens[0, 1:].tolist()) == sorted(blind.target_ids(best.indices).tolist())


def test_the_means_are_those_of_image_positions():
    target = llava()
    blind = twin("eagle3", target)
    features = taught(target, blind, [dialogue(target), dialogue(target, images=0)])
    sums, n = image_means(features, blind.taps)
    assert n == int(features.visual.sum()) > 0
    blind.means.copy_(sums / n)
    shown = blind.blindfold(features)
    for before, after in ((features.embeds, shown.embeds), (features.last_hidden, shown.last_hidden)):
        assert torch.equal(before[~features.visual], after[~features.visual])
        mean = before[features.visual].mean(0)
        assert torch.allclose(after[features.visual], mean.expand(n, -1), atol=1e-12)


def test_a_run_folder_keeps_its_blindness(tmp_path: Path):
    target = llava()
    blind = twin("eagle", target)
    checkpoint.save_head(tmp_path, blind.state_dict(), blind.config, target, blind=True)
    checkpoint.save_tree(tmp_path, checkpoint.DraftTree(2, 2, 4))
    loaded = checkpoint.load(tmp_path)
    assert loaded.blind
    head = loaded.head(target.dtype)
    assert isinstance(head, BlindHead)
    assert torch.allclose(head.means, blind.means)
    requests = [Request(str(k), prompt(target, k), 12, k) for k in range(3)]
    drafted = generate(target, requests, make_drafter(loaded, target), FixedPolicy(2, 4), GreedySampler(), 2)
    plain = generate(target, requests, make_drafter(loaded, target), SkipPolicy(), GreedySampler(), 2)
    assert [output.tokens for output in drafted] == [output.tokens for output in plain]
    (tmp_path / "head.json").write_text(
        json.dumps({k: v for k, v in json.loads((tmp_path / "head.json").read_text()).items() if k != "blind"})
    )
    assert not checkpoint.load(tmp_path).blind  # written before there were twins


@pytest.mark.slow
def test_a_blind_run_takes_the_means_of_its_images_and_starts_from_its_like_alone(tmp_path: Path):
    data = training.save_data(tmp_path, [training.record(k) for k in range(8)])
    target = training.save_target(tmp_path / "target")
    recipe = training.save_recipe(tmp_path / "r.yaml", target, data, tmp_path / "runs", max_steps=2)
    done = training.distill(0, recipe, "head.blind=true")
    assert done.returncode == 0, done.stderr
    loaded = checkpoint.load(tmp_path / "runs" / "t")
    assert loaded.blind
    head = loaded.head()
    assert isinstance(head, BlindHead)
    known = llava(dtype="float32")
    prompts = [known.encode([{"role": "user", "content": [{"type": "image"}]}], [image(k)]) for k in range(8)]
    expected = torch.stack([known.image_features(p.pixels).mean(0) for p in prompts]).mean(0)
    assert torch.allclose(head.means[0], expected, atol=1e-4)
    assert head.means[1].abs().sum() > 0
    refused = training.distill(0, recipe, f"head.init_from={loaded.folder}", "run.name=other")
    assert refused.returncode == 2
    assert "head.blind=true, not false" in refused.stderr
