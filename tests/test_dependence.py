"""Visual dependence: what it is, that stored labels are it, and that weights by it leave the law of the count alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmspec import dependence
from mmspec.types import InputError
from tests import training
from tests.contract.test_heads import dialogue, taught
from tests.drafters import HEADS, make_head
from tests.tiny import image, llava, prompt
from train import labels
from train.dependence import CLIP, Measured, Scale, image_mean
from train.encode import encode, length_limit
from train.labels import Store, distribution, open_labels, read_manifest, write_store
from train.sources import Live, open_source


def naive(seen, unseen):
    """KL, JS and changed argmax of two rows of logits, in plain words."""
    p, q = seen.double().softmax(-1), unseen.double().softmax(-1)
    m = (p + q) / 2
    kl = (p * (p / q).log()).sum(-1)
    js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    return kl, js, p.argmax(-1) != q.argmax(-1)


def test_it_is_the_divergence_of_the_distributions_each_token_was_chosen_from():
    target = llava()
    rows = [dialogue(target), dialogue(target, n_turns=1, images=2), dialogue(target, images=0)]
    prompts, answers = [p for p, _ in rows], [a for _, a in rows]
    mean = dependence.mean_feature(target, [prompt(target, k) for k in range(3)])
    found = dependence.of_conversations(target, prompts, answers, mean)
    for (p, answer), mine in zip(rows, found):
        seen = target.unembed(target.teacher([p], [answer]).last_hidden[0])
        unseen = target.unembed(target.teacher([p], [answer], instead=mean).last_hidden[0])
        before = answer.nonzero().flatten() - 1
        kl, js, changed = naive(seen[before], unseen[before])
        assert torch.allclose(mine.kl.double(), kl, atol=1e-5)
        assert torch.allclose(mine.js.double(), js, atol=1e-5)
        assert torch.equal(mine.changed, changed)
    assert found[0].kl.max() > 1e-3  # an image matters to this target
    assert found[2].kl.abs().max() == 0  # and none to a conversation without


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    target = llava()
    seen, unseen = torch.randn(2, 50, target.shape.hidden_size, dtype=torch.float64)
    whole = dependence.compare(seen, unseen, target.unembed)
    monkeypatch.setattr(dependence, "CHUNK", 7)
    parts = dependence.compare(seen, unseen, target.unembed)
    assert torch.allclose(whole.kl, parts.kl)
    assert torch.equal(whole.changed, parts.changed)
    assert len(dependence.compare(seen[:0], unseen[:0], target.unembed).kl) == 0


def test_the_mean_feature_is_that_of_all_positions():
    target = llava()
    prompts = [prompt(target, 1), prompt(target, 5, images=2), prompt(target, 9, images=0)]
    all_of_them = torch.cat([target.image_features(p.pixels) for p in prompts if p.pixels])
    assert torch.allclose(dependence.mean_feature(target, prompts).double(), all_of_them.mean(0), atol=1e-5)
    assert dependence.mean_feature(target, prompts[2:]) is None


def test_a_blurred_image_has_its_size_and_little_detail():
    picture = image(3)
    soft = dependence.blurred(picture)
    assert soft.size == picture.size
    assert soft.mode == picture.mode
    flat = dependence.blurred(picture.resize((160, 160)))
    assert flat.size == (160, 160)


# ---- weights ----


def test_weights_average_to_one_over_the_data():
    kl = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 6 * 5
    for w in (0.0, 0.5, 3.0):
        weights = Scale.of(kl).weights(kl, w)
        assert float(weights.double().mean()) == pytest.approx(1, abs=1e-6)
        assert (weights > 0).all()
    assert torch.equal(Scale.of(kl).weights(kl, 0.0), torch.ones(1000))
    d = (kl / kl.mean()).clamp_max(CLIP)
    assert torch.allclose(Scale.of(kl).weights(kl, 2.0), (1 + 2 * d) / (1 + 2 * d.mean()), atol=1e-5)
    nothing = torch.zeros(5)
    assert torch.equal(Scale.of(nothing).weights(nothing, 2.0), torch.ones(5))


@pytest.mark.parametrize("kind", HEADS)
def test_a_weight_is_a_factor_of_every_prediction_of_its_token(kind):
    """Summed over tokens, losses with all weight on one token are the loss; and a token's weight is linear."""
    target = llava()
    head = make_head(kind, target, steps=3)
    features = taught(target, head, [dialogue(target), dialogue(target, images=2)])
    whole = head.forward(features, target.unembed)
    answers = (features.answer > 0).nonzero().tolist()
    total = 0.0
    for row, at in answers:
        weight = torch.zeros(features.answer.shape)
        weight[row, at] = 1.0
        alone = head.forward(replace(features, weight=weight), target.unembed)
        assert alone.count == whole.count
        total += alone.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-9)
    ones = head.forward(replace(features, weight=torch.ones(features.answer.shape)), target.unembed)
    assert float(ones.loss) == pytest.approx(float(whole.loss), rel=1e-12)


@pytest.mark.parametrize("pack", [0, 64])
def test_weights_reach_rows_wherever_conversations_stand(pack):
    target = llava()
    rows = [dialogue(target, n_turns=1 + k % 2, images=k % 3) for k in range(4)]
    weights = [torch.arange(len(p), dtype=torch.float32) + 100 * k for k, (p, _) in enumerate(rows)]
    features = target.teacher([p for p, _ in rows], [a for _, a in rows], pack=pack, weights=weights)
    assert features.weight.shape == features.input_ids.shape
    found = sorted(features.weight[features.valid].tolist())
    assert found == sorted(torch.cat(weights).tolist())
    for row in range(len(features.weight)):
        line, ids = features.weight[row], features.input_ids[row]
        for at in features.valid[row].nonzero().flatten().tolist():
            k, place = int(line[at]) // 100, int(line[at]) % 100
            assert ids[at] == rows[k][0].input_ids[place]


# ---- the store ----


def records(n=10):
    made = [training.record(k, turns=1 + k % 2) for k in range(n)]
    for k, entry in enumerate(made):
        entry["topic"] = ("odd", "even")[k % 2 == 0]
    return made


@pytest.fixture
def session(tmp_path: Path):
    s = training.session(tmp_path, records(), loss__dependence="1.5")
    s.prepared = training.prepare(s)
    return s


def test_stored_labels_are_what_is_measured(session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.labels.SHARD_RECORDS", 4)
    out = tmp_path / "labels"
    manifest = write_store(session, out, batch=3)
    assert [part.records for part in manifest.parts] == [4, 4, 2]
    assert read_manifest(out) == manifest
    live, stored = Measured(session), open_labels(session, out)
    source = Live(session, (), stored)
    batch = source.batch(range(5))
    features, prompts = batch.features(), batch.rows
    fresh = live.weigh(replace(features, weight=None), [p for p, _ in prompts], [a for _, a in prompts], 0)
    chosen = dependence.answer_places(features.answer)
    # fp16 has three digits.
    assert torch.allclose(features.weight[chosen], fresh.weight[chosen], rtol=5e-3, atol=5e-3)
    assert features.weight[chosen].std() > 0.01
    topics = {row["topic"]: row for row in distribution(session, Store(out, manifest))}
    assert set(topics) == {"all", "odd", "even"}
    assert topics["all"]["tokens"] == topics["odd"]["tokens"] + topics["even"]["tokens"]


def test_a_corpus_may_have_more_tokens_than_torch_takes_quantiles_of():
    kl = torch.arange(2**24 + 1, dtype=torch.float32) / 2**24
    found = labels._figures(kl, kl > 0.5)
    assert [found[key] for key in ("p50", "p90", "p99")] == pytest.approx([0.5, 0.9, 0.99])
    assert found["tokens"] == len(kl)


def test_the_scale_is_of_conversations_from_the_whole_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Text first, then images: one conversation alone is text, whose scale would weigh all alike without a word."""
    made = records()
    for entry in made[:5]:
        del entry["image"]
        for turn in entry["conversations"]:
            turn["value"] = turn["value"].replace("<image>\n", "")
    s = training.session(tmp_path, made, loss__dependence="1.5")
    s.prepared = training.prepare(s)
    monkeypatch.setattr("train.dependence.SAMPLED", 2)
    Measured(s)
    monkeypatch.setattr("train.dependence.SAMPLED", 1)
    with pytest.raises(InputError, match="1 conversations owe nothing"):
        Measured(s)


def test_a_picture_that_is_lost_is_left_out_of_the_mean_and_the_scale(
    session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was there when it was answered; what was trained since must not be in vain for it."""
    said: list[str] = []
    monkeypatch.setattr(session.tracker, "say", said.append)
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "3.png").write_text("no picture")
    limit, kept = length_limit(session.recipe.data, session.target), [1, 2, *range(4, 10)]
    pairs = [(session.corpus.samples[k], session.prepared.dialogues[k]) for k in kept]
    prompts = [encode(sample, dialogue, session.target, limit)[0] for sample, dialogue in pairs]
    assert torch.allclose(image_mean(session), dependence.mean_feature(session.target, prompts), atol=1e-6)
    [line] = said
    assert line.startswith("2 of 10 records for the mean image feature can no longer be read, the first r0 (")
    assert line.endswith("data.json:1): image is missing: 0.png")
    Measured(session)
    assert [text.split(" can no")[0] for text in said[1:]] == [
        "2 of 10 records for the mean image feature",
        "2 of 10 records for the scale of dependence",
    ]
    for picture in (tmp_path / "images").iterdir():
        picture.write_text("no picture")
    with pytest.raises(InputError, match=r"10 of 10 records for the mean image feature .*; put their pictures"):
        image_mean(session)


def test_an_interrupted_store_goes_on_and_a_damaged_shard_is_found(
    session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("train.labels.SHARD_RECORDS", 4)
    out = tmp_path / "labels"
    first = write_store(session, out)
    (out / "shard-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="shard-00001"):
        open_labels(session, out)
    untouched = (out / "shard-00000.safetensors").stat().st_mtime_ns
    assert write_store(session, out, batch=1).scale.mean == pytest.approx(first.scale.mean, rel=1e-3)
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    open_labels(session, out)
    with pytest.raises(InputError, match="another folder"):
        write_store(session, out, "blur")


def test_labels_of_other_answers_are_refused(session, tmp_path: Path):
    out = tmp_path / "labels"
    write_store(session, out)
    values = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**values, "answers": "0" * 16}))
    with pytest.raises(InputError, match="measured with answers"):
        open_labels(session, out)
    with pytest.raises(InputError, match="measure_dependence"):
        open_labels(session, tmp_path)


def test_a_blur_is_another_counterfactual(session, tmp_path: Path):
    mean, blur = (write_store(session, tmp_path / way, way) for way in ("mean", "blur"))
    a, b = (Store(tmp_path / way, manifest) for way, manifest in (("mean", mean), ("blur", blur)))
    assert {k: len(v.kl) for k, v in a.found.items()} == {k: len(v.kl) for k, v in b.found.items()}
    assert mean.scale != blur.scale


@pytest.mark.parametrize("pack", ["0", "64"])
def test_a_batch_weighs_the_same_however_it_is_split_or_packed(session, pack):
    """The sum of the loss of a batch is that of its parts, with weights measured in the step."""
    session.recipe.data.pack = int(pack)
    head = make_head("eagle", session.target, steps=2)
    source = open_source(session, head.taps)
    whole = head.forward(source.batch(range(6)).features(), session.target.unembed)
    parts = [head.forward(source.batch(some).features(), session.target.unembed) for some in ((0, 1), (2, 3, 4), (5,))]
    assert sum(float(part.count) for part in parts) == float(whole.count)
    assert sum(float(part.loss) for part in parts) == pytest.approx(float(whole.loss), rel=1e-5)
    plain = head.forward(replace(source.batch(range(6)).features(), weight=None), session.target.unembed)
    assert float(plain.loss) != pytest.approx(float(whole.loss), rel=1e-4)
