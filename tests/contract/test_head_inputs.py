"""What heads see of images, and where: training and drafting are one computation for every `image_input` and `rope`."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.heads._drafter import PairDrafter
from mmspec.heads._prefix import ROPES, Pairs, image_spans, pair_axes
from mmspec.heads._unrolled import UnrolledHead
from mmspec.loop import generate
from mmspec.losses import LossConfig
from mmspec.nn import RotaryTable, sections
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.recipe import head_kinds, import_head
from mmspec.sampling import GreedySampler
from mmspec.types import Prompt, Request
from tests import families
from tests.drafters import Erratic, make_head, variant

STEPS, NEW = 4, 24
KINDS = [kind for kind in head_kinds() if issubclass(import_head(kind).Head, UnrolledHead)]
VARIANTS = [(k, i, r) for k in KINDS for i, r in product(import_head(k).Config.image_inputs, ROPES)]
every_variant = pytest.mark.parametrize(("kind", "image_input", "rope"), VARIANTS)
every_target = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])


def shaken(kind, target, loss=None, **settings):
    """A head whose weights are all random: some start as zeros or as an identity, and would hide what they multiply."""
    torch.manual_seed(5)
    head = variant(kind, **settings)(target, loss or LossConfig(steps=STEPS)).double()
    head.prepare(target, lambda: torch.ones(target.shape.vocab_size))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.std().nan_to_num().clamp_min(0.2))
    return head


def ends_with_an_image(target, seed):
    """A prompt whose last token is an image placeholder."""
    whole = families.prompt(target, seed, "last")
    end = int(whole.visual.nonzero().max()) + 1
    return Prompt(whole.input_ids[:end], whole.visual[:end], whole.pixels)


def requests(target, layouts):
    """One a layout, ragged in words and tokens wanted."""
    made = []
    for i, layout in enumerate(layouts):
        ends = layout == "ends_with_an_image"
        prompt = ends_with_an_image(target, i) if ends else families.prompt(target, i, layout, 3 + 2 * i)
        made.append(Request(str(i), prompt, NEW - i, key=i))
    return made


def finished(request, output):
    """The conversation that a request became, and its answer marks."""
    ids = torch.cat([request.prompt.input_ids, torch.tensor(output.tokens)])
    fresh = torch.zeros(len(output.tokens), dtype=torch.bool)
    marks = torch.cat([torch.zeros(len(request.prompt), dtype=torch.long), fresh.long() + 1])
    return Prompt(ids, torch.cat([request.prompt.visual, fresh]), request.prompt.pixels), marks


class Led(PairDrafter):
    """Drafts the true tokens whatever its head says, and notes the logits from which it would have chosen.

    `truth` holds each request's tokens with its prompt's, by key; `seen` [(key, index of the token, step, logits)].
    """

    def _scored(self, states, ahead):
        logits = self.head.logits(states, self.target.unembed)
        scores = torch.full_like(logits, -5.0)
        places = self._positions(ahead).flatten().tolist()
        for row, (key, index) in enumerate(zip(self.keys.tolist(), places)):
            truth = self.truth[key]
            third = index - ahead + 3
            wrong = third % 4 == 0  # every fourth draft has another token there, and is rejected from it on
            if self.kv.lengths[row] and index < len(truth) and (index <= third or not wrong):
                self.seen.append((key, index, ahead - 1, logits[row, 0]))
                scores[row, 0, (int(truth[index]) + (wrong and index == third)) % logits.shape[-1]] = 0.0
        return scores


@pytest.mark.parametrize("layouts", [*([layout] for layout in families.LAYOUTS), ["ends_with_an_image"],
    ["first", "none", "two", "adjacent"], ["ends_with_an_image", "last", "none", "two"]], ids="-".join)  # fmt: skip
@every_target
@every_variant
def test_teacher_forced_logits_equal_drafting_logits_in_the_loop(kind, image_input, rope, family, layouts):
    """Every logit that a chain is drafted from along the true tokens, over rounds of any length and skipped ones
    (fp64, 1e-9): shifts, positions, masks, what is left out and what is kept in mind."""
    target = families.build(family)
    head = shaken(kind, target, image_input=image_input, rope=rope)
    wanted = requests(target, layouts)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler(), max_batch=len(wanted))
    rows = [finished(request, output) for request, output in zip(wanted, plain)]
    led = Led(head, target, 1)
    led.truth, led.seen = {r.key: p.input_ids.tolist() for r, (p, _) in zip(wanted, rows)}, []
    drafted = generate(target, wanted, led, Erratic(STEPS, STEPS), GreedySampler(), max_batch=len(wanted))
    assert [o.tokens for o in drafted] == [o.tokens for o in plain]
    assert all(o.error is None for o in drafted)
    features = target.teacher([p for p, _ in rows], [a for _, a in rows], head.taps)
    with torch.no_grad():
        packed, outputs = head.unroll(features, STEPS)
        logits = [head.logits(states, target.unembed) for states in outputs]
    T, compared = features.input_ids.shape[1], set()
    places = {place: m for m, place in enumerate(packed.tokens[packed.drafts].tolist())}
    for key, index, step, found in led.seen:
        draft = places.get(key * T + index - 2 - step)
        if draft is None:  # it begins at the answer's last token
            continue
        assert torch.allclose(found, logits[step][draft], atol=1e-9, rtol=0), (key, index, step)
        compared.add((key, step))
    assert compared >= {(request.key, 0) for request in wanted}
    assert {step for _, step in compared} >= set(range(STEPS if len(wanted) > 1 else STEPS - 1))


# ---- positions ----


def test_text_pairs_count_up_on_all_axes_and_visual_pairs_follow_the_grid():
    """Text, an image of 2 x 2 tokens, text: the image's last token is followed by text, so its pair is a text pair."""
    target = families.build("qwen2_5_vl")
    axes = torch.tensor([[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]])
    visual = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]).bool()
    expected = torch.tensor([[0, 1, 2, 2, 2, 3, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])
    assert pair_axes(axes, visual).tolist() == expected.tolist()
    prompt = families.prompt(target, 1, "two")
    forward = target.prefill(target.open(1, len(prompt)), 0, prompt)
    found = pair_axes(forward.positions, forward.visual)[:, 0]
    text = ~prompt.visual[1:]
    assert (found[:, text] == found[0, text]).all()
    assert (found[0, text].diff() > 0).all()
    assert int(found[0, -1]) == int(forward.positions.max()) - 1


def test_axes_turn_their_sections_of_the_frequencies():
    assert sections(128) == (16, 24, 24)
    table = RotaryTable(16, 100.0)
    cos, sin = table.along(torch.tensor([[7], [3], [5]]), 8, torch.float64)
    for part, place in zip(zip(*(x[0, 0, 0].chunk(2) for x in (cos, sin))), range(2)):
        where = torch.tensor([7, 7, 3, 3, 3, 5, 5, 5])
        for found, known in zip(part, table.at(where.unsqueeze(0), 8, torch.float64)):
            assert torch.equal(found, known[0, 0, :, 8 * place : 8 * place + 8].diagonal())
    even = table.along(torch.tensor([[2, 6]]).expand(3, -1), 8, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(even, table.at(torch.tensor([[2, 6]]), 8, torch.float64)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_counts_tokens_has_one_rope(kind):
    target = families.build("llava")
    rows = [families.dialogue(target, 1, "two"), families.dialogue(target, 2, "first")]
    found = []
    for rope in ROPES:
        head = shaken(kind, target, rope=rope)
        features = target.teacher([p for p, _ in rows], [a for _, a in rows], head.taps)
        found.append(head(features, target.unembed).loss)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_mrope_moves_what_an_image_of_a_grid_is(kind):
    """Or the setting would do nothing."""
    target = families.build("qwen2_5_vl")
    rows = [families.dialogue(target, 3, "first")]
    losses = []
    for rope in ROPES:
        head = shaken(kind, target, rope=rope)
        losses.append(float(head(target.teacher([rows[0][0]], [rows[0][1]], head.taps), target.unembed).loss.detach()))
    assert losses[0] != pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("kind", "image_input", "left"), [("eagle", "none", 0), ("vispec", "compressed", 1)])
def test_text_keeps_its_place_whatever_is_left_of_images(kind, image_input, left, rope):
    target = families.build("qwen2_5_vl")
    prompt = families.prompt(target, 1, "two")
    head = shaken(kind, target, image_input=image_input, rope=rope)
    drafter = head.drafter(target, 2)
    drafter.open(2, 128)
    forward = target.prefill(target.open(1, len(prompt)), 0, prompt)
    drafter.admit(0, Request("r", prompt, 1), forward, torch.tensor(3))
    drafter._take_in(keep_last=False)
    n_text, n_images = int((~prompt.visual).sum()), len(image_spans(prompt.visual))
    assert drafter.kv.lengths[0] == n_text + left * n_images
    where = int(forward.positions.max()) if rope == "mrope" else len(prompt) - 1
    for found, known in zip(drafter._rope(-1, 1), head.rotary.at(torch.tensor([[where]]), 128, torch.float64)):
        assert torch.equal(found[0], known[0])
    assert int(drafter._positions(1)[0]) == len(prompt) + 1
    drafter.evict(0)
    assert not any(drafter.shift)
    assert not drafter.moved.any()


# ---- what is seen ----


def inputs(head, target, prompt):
    """The head's block inputs for a prompt, and which pairs they are of."""
    forward = target.prefill(target.open(1, len(prompt)), 0, prompt, head.taps)
    pairs = Pairs(forward.embeds[0, 1:], head.read(forward)[0, :-1], None, len(prompt), prompt.visual[1:])
    return forward, head.prefix(pairs)


def test_without_images_the_head_reads_states_and_no_image_feature():
    target = families.build("llava")
    prompt = families.prompt(target, 4, "two")
    _, prefix = inputs(shaken("eagle", target, image_input="none"), target, prompt)
    _, whole = inputs(shaken("eagle", target), target, prompt)
    assert prefix.kept.tolist() == (~prompt.visual[1:]).tolist()
    assert torch.equal(prefix.inputs[0], whole.inputs[0, prefix.kept])
    assert prefix.inputs.shape[1] == len(prompt) - 1 - int(prompt.visual.sum())


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_with_states_alone_the_head_sees_the_placeholders_embedding(kind):
    target = families.build("qwen2_5_vl")
    prompt = families.prompt(target, 4, "first")
    head = shaken(kind, target, image_input="aux")
    forward, prefix = inputs(head, target, prompt)
    embedded = target.embed(prompt.input_ids[1:])
    expected = head.pair(embedded, head.enter(head.read(forward)[0, :-1]))
    assert torch.equal(prefix.inputs[0], expected)
    assert "placeholder" in head.state_dict()
    assert "placeholder" not in shaken(kind, target).state_dict()


def test_a_visual_pair_of_msd_is_the_image_feature_and_the_pair_behind_it_has_the_last_visual_state():
    target = families.build("llava")
    prompt = families.prompt(target, 4, "first")
    head = shaken("msd", target)
    forward, prefix = inputs(head, target, prompt)
    visual, f = prompt.visual[1:], forward.last_hidden[0]
    assert torch.equal(prefix.inputs[0, visual], forward.embeds[0, 1:][visual])
    behind = int(prompt.visual.nonzero().max())
    assert not visual[behind]
    after = head.pair(forward.embeds[0, behind + 1], f[behind])
    assert torch.allclose(prefix.inputs[0, behind], after, atol=1e-12)
    # Language's projection learns of language alone.
    prefix.inputs[0, visual].sum().backward()
    assert not head.fc.weight.grad.any()


def vispec_notes(target, prompt, head, changed=None):
    """The note of every pair kept, and the one in force behind; with the features of one image changed."""
    forward = target.prefill(target.open(1, len(prompt)), 0, prompt)
    embeds = forward.embeds[0, 1:].clone()
    if changed is not None:
        start, stop = image_spans(prompt.visual[1:])[changed]
        embeds[start:stop] += 1.0
    prefix = head.prefix(Pairs(embeds, forward.last_hidden[0, :-1], None, len(prompt), prompt.visual[1:]))
    return prefix


def test_each_image_is_read_by_its_own_length_and_kept_in_mind_until_the_next():
    """Two images of different sizes; the reference took every image's length to be the first's."""
    target = families.build("qwen2_5_vl")
    prompt = families.prompt(target, 1, "two")
    spans = image_spans(prompt.visual[1:])
    assert len({stop - start for start, stop in spans}) == 2  # or there is nothing to see
    head = shaken("vispec", target, n_queries=3)
    prefix = vispec_notes(target, prompt, head)
    places = prefix.kept.nonzero().flatten()
    shown = prompt.visual[1:][places]
    assert places[shown].tolist() == [place for _, stop in spans for place in (stop - 2, stop - 1)]
    before, between = places < spans[0][0], (places >= spans[0][1]) & (places < spans[1][0])
    behind = places >= spans[1][1]
    assert all(some.any() for some in (before, between, behind))
    assert not prefix.notes[0, before].any()
    for image, (moved, still) in enumerate([(between, behind), (behind, between)]):
        other = vispec_notes(target, prompt, head, image)
        assert torch.equal(other.notes[0, before | still], prefix.notes[0, before | still])
        assert (other.notes[0, moved] != prefix.notes[0, moved]).all()
        vectors = (other.inputs != prefix.inputs)[0].any(-1) & shown
        assert vectors.tolist() == [v and (p < spans[0][1]) == (image == 0) for p, v in zip(places, shown.tolist())]
        forward = target.prefill(target.open(1, len(prompt)), 0, prompt)
        start, stop = spans[image]
        alone = head.adaptor(forward.embeds[0, 1:][start:stop], [stop - start])
        assert torch.allclose(prefix.inputs[0, shown][2 * image : 2 * image + 2], alone[0, :2], atol=1e-12)
    assert torch.equal(prefix.latest[0], prefix.notes[0, -1:])


def test_the_global_feature_starts_as_nothing_and_the_injection_as_the_state():
    target = families.build("llava")
    torch.manual_seed(0)
    head = variant("vispec")(target).double()
    state = torch.randn(1, 3, 32, dtype=torch.float64)
    assert torch.equal(head.inject_state(state), state)
    assert not head.inject_image(state).any()


def test_drafts_have_the_image_in_mind():
    """Also in later rounds and in the tree: with another note the same draft is another."""
    target = families.build("llava")
    prompt = families.prompt(target, 4, "first")
    drafter = shaken("vispec", target).drafter(target, 2)
    drafter.open(1, 128)
    forward = target.prefill(target.open(1, len(prompt)), 0, prompt)
    drafter.admit(0, Request("r", prompt, 1), forward, torch.tensor(3))
    drafter._take_in(keep_last=False)
    states = drafter._root_state()
    found = []
    for factor in (1.0, 0.0):
        drafter.kv.begin_tree(1)
        drafter.notes *= factor
        mask = torch.zeros(1, 1, 1, drafter.kv.offset + 1, dtype=torch.float64)
        found.append(drafter._draft_pass(torch.tensor([[4]]), states, drafter._rope(0, 1), mask))
    assert (found[0] - found[1]).abs().max() > 1e-6


def test_no_round_runs_the_target_twice():
    target = families.build("llava")
    passes = []

    class Counted:
        def __getattr__(self, name):
            return getattr(target, name)

        def forward(self, *args):
            passes.append(1)
            return target.forward(*args)

    drafter = shaken("vispec", target).drafter(target, 2)
    wanted = [Request("r", families.prompt(target, 1, "first"), 12)]
    (output,) = generate(Counted(), wanted, drafter, FixedPolicy(3, 5), GreedySampler())
    assert len(passes) == len(output.rounds) > 1


def test_a_batch_without_images_reaches_every_weight_of_the_adaptor_with_zeros():
    """Ranks must not skip a module alone."""
    target = families.build("llava")
    head = shaken("vispec", target)
    prompt, marks = families.dialogue(target, 1, "none")
    calls = []
    head.adaptor.register_forward_pre_hook(lambda *_: calls.append(1))
    head(target.teacher([prompt], [marks]), target.unembed).loss.backward()
    assert len(calls) == 1
    for name, parameter in head.named_parameters():
        image = name.startswith(("adaptor", "inject_image"))
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) != image, name


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_settings_are_refused_in_one_line_that_names_the_known_ones(kind):
    config = import_head(kind).Config
    other = next(v for v in ("none", "aux", "embeds", "compressed") if v not in config.image_inputs)
    with pytest.raises(ValueError, match=rf"head\.image_input='{other}': the {kind} head knows") as error:
        config(image_input=other)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"head\.rope='3d': the {kind} head knows 1d, mrope"):
        config(rope="3d")


def test_make_head_knows_every_kind():
    for kind in KINDS:
        assert make_head(kind, families.build("llava")).config.image_input in import_head(kind).Config.image_inputs
