"""Writes the recipes of public targets: one whole, readable file for each head and target, from one table of each.

    python scripts/write_recipes.py            # recipes/<head>_<target>.yaml, all of them
    python scripts/write_recipes.py --check    # writes nothing; exit code 1 where a file differs

A recipe says everything itself, so that who reads or copies one needs no second file; what 35 of them have in common is
said once, here. Memory and hours in their headers are the planner's for GPUS devices, the expected tau is what
recipes/results/published.yaml knows. Recipes that are not in these tables (of the embedded target, of small GPUs, of
adapters) are written by hand.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmspec.arguments import Parser, command  # noqa: E402
from mmspec.recipe import Recipe, load  # noqa: E402
from train import memory  # noqa: E402
from train.estimate import GIB, Assumed, answer_seconds, sizes, work  # noqa: E402
from train.shapes import target_facts  # noqa: E402

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PUBLISHED = RECIPES / "results" / "published.yaml"
GPUS = 4
"""Devices that the headers' figures are for; a step has 16 conversations on any number of them."""
CARDS = (24, 40, 80, 141)
"""GB of devices; 4 of them are left to libraries and fragments."""
RECORDS = 68000
"""Of each source that are trained on."""
MIX = "/data/llava/llava_v1_5_mix.json"
"""Where the commands of headers have their data."""
COLUMN = 32
"""Where comments stand."""


@dataclass(frozen=True)
class Target:
    """What recipes say of a target.

    Args:
        title: for readers.
        name: Hub id.
        max_length: of a conversation, in tokens.
        pictures: of how many of them are a picture's, in words.
        answer_batch: answers decoded together; their buffers are what memory is full of then.
        draft_vocab: tokens that EAGLE-3 drafts, 0: all.
        large: whether one conversation is all that a pass of training has room for.
        near: targets whose published figures stand in for its own, the nearest first.
    """

    title: str
    name: str
    max_length: int
    pictures: str
    answer_batch: int
    draft_vocab: int = 0
    large: bool = False
    near: tuple[str, ...] = ()

    @property
    def qwen(self) -> bool:
        """Whether it is one of Qwen's families, whose positions are not Llama's."""
        return self.name.startswith("Qwen/")


LLAVA, NEXT = "576 of them are the picture's", "up to 2,928 of them are a picture's"
QWEN2_5 = "some 260 to 1,280 of them are a picture's"
QWEN3 = "some 200 to 1,280 of them are a picture's"
TARGETS = {
    "llava7b": Target("LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", 2048, LLAVA, 32, near=("llava_next_7b",)),
    "llava13b": Target(
        "LLaVA-1.5-13B", "llava-hf/llava-1.5-13b-hf", 2048, LLAVA, 16, large=True, near=("llava_next_13b", "llava7b")
    ),
    "llava_next_7b": Target(
        "LLaVA-NeXT-7B", "llava-hf/llava-v1.6-vicuna-7b-hf", 4096, NEXT, 16, large=True, near=("llava7b",)
    ),
    "qwen2_5_vl_3b": Target(
        "Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B-Instruct", 3072, QWEN2_5, 32, 32000, near=("qwen2_5_vl_7b",)
    ),
    "qwen2_5_vl_7b": Target("Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct", 3072, QWEN2_5, 32, 32000),
    "qwen3_vl_4b": Target(
        "Qwen3-VL-4B", "Qwen/Qwen3-VL-4B-Instruct", 3072, QWEN3, 32, 32000, near=("qwen2_5_vl_3b", "qwen2_5_vl_7b")
    ),
    "qwen3_vl_8b": Target(
        "Qwen3-VL-8B", "Qwen/Qwen3-VL-8B-Instruct", 3072, QWEN3, 32, 32000, near=("qwen3_vl_4b", "qwen2_5_vl_7b")
    ),
}


@dataclass(frozen=True)
class Head:
    """What recipes say of a head; nodes are YAML, with comments behind ` # `.

    Args:
        title: for readers, with {} for the target.
        kind: file of `mmspec/heads`.
        node, qwen: the `head` node, and what it has besides for Qwen's families.
        loss, policy: these nodes.
        lr: learning rate.
        single: whether its unrolled steps leave a pass room for one conversation alone.
        light: whether it has room for two beside a large target too.
        text_first: whether it is trained on text first (MSD).
        zero_stage: of the engine.
    """

    title: str
    kind: str
    node: str
    qwen: str
    loss: str
    policy: str
    lr: str = "1.0e-4"
    single: bool = False
    light: bool = False
    text_first: bool = False
    zero_stage: int = 2


BASE = "rope_theta: {rope_theta} # as the target's"
ROPE = f"{BASE}\nrope: 1d # places in the conversation; mrope: the target's three axes"
FIXED = """\
kind: fixed # the head alone, no controller
depth: {depth} # draft levels
width: {width} # candidates per level
budget: 59 # draft nodes verified per round"""
TREE = FIXED.format(depth=6, width=10)
LEARNED = """\
kind: learned # train the controller after the head
depth: 7 # draft levels
width: 8 # candidates per level
budget: 48 # draft nodes verified per round
rollouts: 4000 # training turns decoded to label rounds
sampled_share: 0.25 # of those, sampled at temperature 1; the others are greedy
rollout_batch: 8
steps: 2000 # controller steps
controller:
  depth: 8 # deepest draft it is asked about
  width: 256
  n_mass: 4 # layers whose visual attention is distilled
  mass_weight: 0.3 # of that term
  counterfactual: mean # dependence on the image, by the mean feature in its place; none: no such heads
  dependence_weight: 0.3 # of how much the next tokens depend on it
  changed_weight: 0.1 # of whether one of them would be another
optim:
  lr: 1.0e-3
  weight_decay: 0.01
  micro_batch: 1024 # rounds per process"""
HEADS = {
    "eagle3": Head(
        "EAGLE-3 head for {}.",
        "eagle3",
        """\
taps: {taps} # the target's hidden states it reads; what it takes by itself of {n_layers} layers
draft_vocab_size: {draft_vocab} # {drafted}
image_input: aux # at image positions the target's states, no image features: as engines draft""",
        BASE,
        """\
steps: 7 # unrolled draft steps: the head sees its own predictions
soft_ce: 1.0 # match the target's distribution; EAGLE-3 regresses no states
step_decay: 0.8 # weight of step s is 0.8^s""",
        TREE,
        single=True,
    ),
    "medusa": Head(
        "Medusa heads for {}.",
        "medusa",
        """\
n_ahead: 4 # heads, each for a token further ahead: at most five tokens a round
own_head: false # all use the target's frozen unembedding: {medusa_m:.0f} M parameters are trained""",
        "",
        """\
steps: 4 # as many as there are heads
soft_ce: 1.0 # match the target's distribution
step_decay: 0.8 # weight of head j is 0.8^(j - 1)""",
        FIXED.format(depth=4, width=16),
        lr="3.0e-4",
        light=True,
        zero_stage=1,
    ),
    "msd": Head(
        "MSD head for {}: EAGLE with text and image decoupled where they enter, trained on text first.",
        "msd",
        "image_input: embeds # the image features themselves, past the projection of pairs",
        f"input_norm: true # as the reference has for Qwen\n{ROPE}",
        """\
unroll: ttt # the head sees its own predictions, where the paper trains a step alone
steps: 3 # unrolled draft steps
soft_ce: 1.0 # match the target's distribution
regression: 0.1 # and, a little, its states""",
        TREE,
        text_first=True,
    ),
    "viskip": Head(
        "EAGLE head and ViSkip controller for {}.",
        "eagle",
        "",
        BASE,
        """\
steps: 3 # unrolled draft steps: the head sees its own predictions
soft_ce: 1.0 # match the target's distribution
regression: 0.1 # and, a little, its states""",
        LEARNED,
    ),
    "vispec": Head(
        "ViSpec head for {}: each image as a few vectors, one of which is kept in mind.",
        "vispec",
        """\
image_input: compressed # the adaptor makes the vectors of the image features
n_queries: 2 # vectors of an image: one in its place, one that is kept in mind""",
        ROPE,
        """\
unroll: ttt # the head sees its own predictions, where the paper trains a step or two
steps: 3 # unrolled draft steps
soft_ce: 1.0 # match the target's distribution
total_variation: 0.5 # and its probabilities: half of this is the chance of rejection
ranking: 0.1 # and the order of its 10 best tokens""",
        TREE,
    ),
}

BODY = """\
target:
  name: {name} # hub id or local folder
  dtype: bfloat16
head:
  kind: {kind} # mmspec/heads/{kind}.py; its sizes follow the target
{head}
data:
  sources:
{sources}
{order}
  answers: regenerated # the target answers the questions itself: train on what will be verified
  max_new_tokens: 512 # per answer
  answer_batch: {answer_batch} # answers decoded together
  max_length: {max_length} # tokens; {pictures}
  max_bad_share: 0.05 # stop when more of the records than this are unusable
  decontaminated: data/{folder}/decontaminated.json # what MMSpec holds too is not trained on; no start without it
loss:
{loss}
optim:
  lr: {lr}
  warmup: 250 # steps, about 1.5 percent
  schedule: cosine
  betas: [0.9, 0.95]
  clip: 0.5 # gradient norm
  micro_batch: {micro} # conversations per process and pass
  accumulate: {accumulate} # passes per step: 16 conversations a step on {gpus} processes
policy:
{policy}
run:
  name: {run} # everything goes to runs/{run}
  seed: 0
  max_steps: 17000 # {epochs}
  eval_every: 500 # real tau on held-out prompts
  eval_data: synth:val
  eval_prompts: 64
  save_every: 500 # resumable state, besides the one a stop leaves
deepspeed:
  zero_stage: {zero_stage} # {stage}
  bf16: true # fp32 master weights stay in the optimizer
"""
PICTURES = f"""\
    - path: data/llava/llava_train.json # LLaVA JSON; images relative to its folder, its images/ or its image/
      limit: {RECORDS}"""
TEXTS = f"""\
    - path: data/sharegpt/sharegpt.json # text; the order of both kinds is text_first's business
      limit: {RECORDS}
"""
TEXT_FIRST = "  text_first: 0.5 # text alone for half of the steps, then ever more pictures, at last nothing else"


def body(head: str, target: str) -> str:
    """A recipe behind its header; `head` and `target` are of HEADS and TARGETS."""
    h, t = HEADS[head], TARGETS[target]
    shape = target_facts(t.name).shape
    known = {
        "taps": [2, shape.n_layers // 2, shape.n_layers - 3],
        "n_layers": shape.n_layers,
        "draft_vocab": t.draft_vocab,
        "drafted": f"of {shape.vocab_size:,} tokens: those that answers are made of"
        if t.draft_vocab
        else "all of the target's tokens",
        "rope_theta": shape.rope_theta,
        "medusa_m": 4 * (shape.hidden_size + 1) * shape.hidden_size / 1e6,
    }
    node = "\n".join(part for part in (h.node, h.qwen if t.qwen else "") if part)
    alone = h.single or (t.large and not h.light)
    text = BODY.format(
        name=t.name,
        kind=h.kind,
        head=textwrap.indent(node.format(**known), "  "),
        sources=TEXTS * h.text_first + PICTURES,
        order=TEXT_FIRST * h.text_first,
        answer_batch=t.answer_batch,
        max_length=t.max_length,
        pictures=t.pictures,
        folder="msd" if h.text_first else "llava",
        loss=textwrap.indent(h.loss, "  "),
        lr=h.lr,
        micro=1 if alone else 2,
        accumulate=4 if alone else 2,
        gpus=GPUS,
        policy=textwrap.indent(h.policy, "  "),
        run=f"{head}_{target}",
        epochs="head steps of 16: by text_first three passes over the text, one over the pictures"
        if h.text_first
        else f"head steps: four epochs of {RECORDS:,} at 16 a step",
        zero_stage=h.zero_stage,
        stage="the head is small: any stage gives the same curve"
        if h.zero_stage == 1
        else "optimizer state and gradients are shared out",
    )
    return "".join(_aligned(line) for line in text.splitlines() if line)


def _aligned(line: str) -> str:
    """The comment of a line in its column, or three spaces behind."""
    key, mark, comment = line.partition(" # ")
    return f"{key.ljust(COLUMN) if len(key) < COLUMN else key + '   '}# {comment}\n" if mark else f"{line}\n"


def render(head: str, target: str, published: Mapping[str, Any]) -> str:
    """A whole recipe.

    Args:
        head, target: of HEADS and TARGETS.
        published: what recipes/results/published.yaml holds.
    """
    recipe = body(head, target)
    with tempfile.TemporaryDirectory() as folder:
        # The planner plans what a reader will load: the file itself.
        path = Path(folder) / f"{head}_{target}.yaml"
        path.write_text(recipe, encoding="utf-8")
        plan = _plan(load(path))
    lines = [HEADS[head].title.format(TARGETS[target].title), "", *_commands(head, target), ""]
    for text in (
        plan,
        _expected(head, target, published),
        "Written by scripts/write_recipes.py. To change it, copy it.",
    ):
        lines += textwrap.wrap(text, 118, break_on_hyphens=False, break_long_words=False)
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + recipe


def _commands(head: str, target: str) -> list[str]:
    name = f"recipes/{head}_{target}.yaml"
    check, train = f"  python scripts/decontaminate.py {name}", f"  deepspeed train/distill.py {name}"
    plan = f"  python train/distill.py {name} --dry-run      # sizes, memory and disk; needs no weights"
    if HEADS[head].text_first:
        return [f"{check} --benchmark MMSPEC_FOLDER", train, plan]
    # Not data.train, which would take all of the mix.
    data = f'  DATA="data.sources=[{{path: {MIX}, limit: {RECORDS}}}]"'
    return [data, f'{check} "$DATA" --benchmark MMSPEC_FOLDER', f'{train} "$DATA"', plan]


def _plan(recipe: Recipe) -> str:
    """Memory and hours in words, to two digits."""
    sized, assumed = sizes(recipe), Assumed()
    held = memory.count(recipe, sized.target, sized.head, memory.worst(recipe, sized.target), GPUS, decoding=True)
    answers, training = held.total("answers") / GIB, held.total(held.fullest) / GIB
    card = next(gb for gb in CARDS if held.peak / GIB <= gb - 4)
    asked = answer_seconds(recipe, sized, GPUS, assumed) / 3600
    trained = work(recipe, sized, GPUS, assumed).seconds * recipe.run.max_steps / 3600
    return (
        f"Hardware: {GPUS} GPUs of {card} GB; on another number set optim.accumulate so that a step keeps its 16. "
        f"scripts/plan.py --gpus {GPUS} counts {answers:.2g} GiB on each while answers are made (data.answer_batch="
        f"{recipe.data.answer_batch}) and {training:.2g} in training, {asked:.2g} hours for answers and {trained:.2g} "
        f"for training at {assumed.utilisation:.0%} of {assumed.tflops:g} TFLOP/s. Nothing of it was measured on a GPU."
    )


def _expected(head: str, target: str, published: Mapping[str, Any]) -> str:
    """What others have measured, of this target or else of the nearest one."""
    kind, own = HEADS[head].kind, "of EAGLE alone, " if head == "viskip" else ""
    for key in (target, *TARGETS[target].near):
        found = [entry for entry in published["figures"] if entry["head"] == kind and entry["target"] == key]
        if found:
            other = "" if key == target else f"none for this target, but of {published['targets'][key].split('/')[-1]} "
            said = "; ".join(_figure(entry, published["sources"]) for entry in found)
            return f"Expected tau: not measured here. Published: {own}{other}{said}."
    return "Expected tau: not measured here, and nothing is published for this head and target or one near it."


def _figure(entry: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    mat, note = entry["mat"], f" ({entry['note']})" if "note" in entry else ""
    figure = f"{mat[0]:.2f} to {mat[1]:.2f}" if isinstance(mat, list) else f"{mat:.2f}"
    return f"{figure} on {entry['data']}{note}, {sources[entry['source']]['name']}"


@command("write_recipes")
def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, 1 when --check finds a difference, or 2 for wrong input."""
    parser = Parser(prog="scripts/write_recipes.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, list the files that differ")
    arguments = parser.parse_args(argv)
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    different = []
    for target in TARGETS:
        for head in HEADS:
            path, text = RECIPES / f"{head}_{target}.yaml", render(head, target, published)
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                continue
            different.append(path.name)
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    said = "differ from what is written here" if arguments.check else "written"
    print(
        f"{len(different)} of {len(TARGETS) * len(HEADS)} recipes {said}{': ' * bool(different)}{', '.join(different)}"
    )
    return int(arguments.check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
