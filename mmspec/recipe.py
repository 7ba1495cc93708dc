"""Recipes: typed settings of one training run, read from YAML and the command line.

Invariant: whatever is wrong with a recipe is an `InputError` of one line that names the key or value and the remedy,
and what `load` returns are plain dataclasses (no OmegaConf object leaves this file). `head.kind: foo` imports
`mmspec.heads.foo`, whose `Config` gives the other keys of the `head` node: the file name is the registry.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import pkgutil
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import mmspec.heads
from mmspec.losses import LossConfig
from mmspec.types import InputError

HEAD_KEYS = ("kind", "init_from", "init_layer", "lora", "blind")
"""Keys of the `head` node that are no field of the head's `Config`."""
FORMATS = ("llava", "messages", "sharegpt")
"""Layouts of conversations that `data.sources.format` may name."""
DROP_RULES = ("empty", "loop", "special", "cut")
"""Kinds of degenerate answers that `data.drop` may name."""
TRACKERS = ("wandb", "tensorboard")
NOT_A_DRAFT_HEAD = ("base", "viskip")
"""Files of `mmspec/heads` that `head.kind` cannot name, besides the `_shared` ones: the base, and the controller."""


@dataclass
class TargetNode:
    """Which frozen model is distilled."""

    name: str = MISSING
    """`tiny_llava` (embedded), a folder in Hugging Face layout, or a hub id."""
    dtype: str = MISSING
    """float32 or bfloat16."""
    device: str = "auto"
    """auto: this rank's CUDA device where there is one, else the CPU."""
    placement: str = "replicated"
    """Where the text layers live; the rest of the target is whole on every device, and what is computed is the same.
    replicated: whole on every device. sharded: shared out over the processes and gathered layer by layer for a pass;
    made for the long passes of training, since decoding gathers all weights for every token. offloaded: in host memory,
    a copy for each process, layer by layer on the device during a pass. With `data.features` and `run.eval_every: 0`
    head training has no pass but the last measurement, so nothing of them takes up the device."""
    quantize: str = "none"
    """none, 8bit (torchao) or 4bit (bitsandbytes): the matrices of the text layers, replicated only. That is another
    target: answers and features are made anew with it, and losslessness is with respect to it."""

    @property
    def arithmetic(self) -> str:
        """What changes the target's numbers beside its weights: dtype and quantisation."""
        return self.dtype if self.quantize == "none" else f"{self.dtype} {self.quantize}"


@dataclass
class Lora:
    """Low-rank adapters in place of a head's own weights, which stay as they are; what is saved is merged."""

    rank: int = 0
    """Of the adapters: rank x (in + out) weights a layer; 0: none, the head is trained whole."""
    alpha: float = 16.0
    """An adapter's product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of what enters an adapter, in training. What it drops depends on how the batch is split among processes."""
    modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc"]
    )
    """Linear layers of the head that get one; `lm_head` too, where a head has its own."""


@dataclass
class HeadNode:
    """The draft head; every other key of the node is a field of `mmspec.heads.<kind>.Config`."""

    kind: str = MISSING
    init_from: str | None = None
    """A run folder whose head of the same shape is where training starts."""
    config: Any = None
    init_layer: int | None = None
    """A decoder layer of the target that the head's block starts as a copy of; 0 is the first, -1 the last."""
    lora: Lora = field(default_factory=Lora)
    """With `init_from` adapters are all that is trained; with `init_layer` they stand for the block's matrices."""
    blind: bool = False
    """Train the vision-blind twin: it reads means wherever an image stands (`mmspec/heads/_blind.py`)."""


@dataclass
class Source:
    """One data source."""

    path: str = MISSING
    """`synth:train`; a JSON, JSONL or Parquet file; a folder with Parquet files, `llava.json` or what `datasets` saved;
    or a set of the Hub, `hub:org/name` or `hub:org/name/configuration`."""
    weight: float = 1.0
    """How often a record is drawn per epoch: 2 twice, 0.5 in every other epoch on average."""
    limit: int | None = None
    """Use the first so many records."""
    topic: str | None = None
    """Of those, use the records of this topic, or category where they name no topic. What cannot be decoded is
    quarantined whatever it was."""
    format: str | None = None
    """llava, messages or sharegpt; default: recognised record by record."""
    split: str | None = None
    """Of a set that has several; default: train."""


@dataclass
class Instruction:
    """What some conversations are asked for besides, so that answers of several lengths are learned."""

    text: str = ""
    """Stands on a line of its own behind the first question, as in "Please answer with at least 1000 words."; it is
    part of the conversation, in training too, for the target's answer is its answer to this. Empty: a limit alone."""
    share: float = 1.0
    """Of the conversations; those that are left over are asked as they are. Which ones depends on `data.answer_seed`
    and their place alone."""
    max_new_tokens: int | None = None
    """Limit of their answers; default: `data.max_new_tokens`."""


@dataclass
class Data:
    """What the head is trained on."""

    sources: list[Source] = field(default_factory=list)
    answers: str = "regenerated"
    """regenerated: the target's own answers (recommended); given: the answers of the data file."""
    max_new_tokens: int = 192
    """Limit of a regenerated answer, in tokens."""
    instructions: list[Instruction] = field(default_factory=list)
    """Asked of shares of the conversations, which add up to 1 at most."""
    sampled_share: float = 0.0
    """Share of the conversations whose answers are sampled; the others are greedy. Which ones, and with which noise,
    depends on `data.answer_seed` and their place in the data alone."""
    temperature: float = 1.0
    """Of sampled answers."""
    top_p: float = 1.0
    """Of sampled answers: from the smallest set of tokens with at least this probability."""
    answer_seed: int = 0
    """Of everything that chance decides about answers; not `run.seed`, so that runs of several seeds share answers."""
    drop: list[str] = field(default_factory=lambda: ["empty", "loop", "special"])
    """Regenerated answers that are dropped, with their conversation: empty; loop (ends in a block of at most 32 tokens
    over and over, 4 times and 32 tokens at least); special (holds a special token or an image placeholder); cut
    (reached its limit before a stop token)."""
    max_degenerate_share: float = 0.2
    """The run stops when more than this share of the records is dropped for these reasons. They are listed in the
    quarantine, but count here, not for `max_bad_share`: it is the target or the settings that need a look, not the
    data."""
    answer_head: str | None = None
    """A run folder whose head drafts the answers: the same ones, sooner."""
    answer_method: str | None = None
    """A method without training that drafts them, such as pld or sam; with `answer_head` hybrid, which uses both."""
    answer_batch: int = 16
    """Rows decoded together while answers are regenerated."""
    answers_dir: str | None = None
    """Where regenerated answers are kept; default `<run folder>/answers`. Share it between runs on the same data."""
    features: str = ""
    """A folder of scripts/extract_features.py with the target's states, which brings its answers along; empty: the
    target computes its states anew at every step."""
    dependence: str = ""
    """A folder of scripts/measure_dependence.py, for `loss.dependence`; empty: a second pass of the target at every
    step, with the mean image feature in place of the image's."""
    max_length: int | None = None
    """Longer conversations are quarantined; default: the target's context."""
    text_first: float | None = None
    """Share of the steps that see samples without a picture alone, as in 0.5; from there on the probability that a
    sample has one rises to 1 at the last step. None: samples come as their weights say."""
    pack: int = 0
    """Tokens of a row of the target's pass that the conversations of a micro-batch share, each as if it were alone; 0:
    a row each, padded to the longest. What is learned is the same."""
    workers: int = 1
    """Threads of a process that open pictures and tokenise for it, ahead of training; the order of data is the same for
    any number."""
    max_bad_share: float = 0.05
    """The run stops when more than this share of the records is quarantined."""
    decontaminated: str | None = None
    """The list of scripts/decontaminate.py of samples that a benchmark holds too: they are not trained on. Training
    refuses to start without the list that is named here, or with one that was made for other data."""


@dataclass
class Optim:
    """AdamW, its schedule and the batch: global batch = processes x micro_batch x accumulate."""

    lr: float = MISSING
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """cosine, linear or constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 0.5
    """Global gradient norm limit; 0: none."""
    micro_batch: int = MISSING
    """Sequences (for the controller: rounds) per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    ema: float = 0.0
    """Decay of an average of the weights (0.999): it is what is measured and saved; 0: the last weights are. Of
    adapters (`head.lora`) each factor is averaged, not their product."""


@dataclass
class PolicyNode:
    """How much to draft when decoding, and the training of the ViSkip controller."""

    kind: str = "learned"
    """learned: train the controller after the head; fixed: no controller."""
    depth: int = MISSING
    """Draft levels."""
    width: int = MISSING
    """Candidates kept and expanded per level."""
    budget: int = MISSING
    """Draft nodes verified per round, the root excluded."""
    method: str | None = None
    """Train a controller for this training-free method instead of a head; nothing else is (`run.max_steps: 0`)."""
    rollouts: int = 256
    """Training requests decoded with the trained head to label rounds."""
    sampled_share: float = 0.0
    """Share of those that are sampled, at temperature 1; the others are greedy. Chances of acceptance are others there,
    and held-out calibration is told by temperature."""
    rollout_batch: int = 8
    """Rows decoded together in the rollout."""
    rollouts_from: str | None = None
    """Take the rounds of this run folder, of the same data and draft, instead of decoding: for a controller that reads
    something else."""
    steps: int = 300
    """Optimizer steps of the controller."""
    controller: Any = None
    """Fields of `mmspec.heads.viskip.Config`."""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, weight_decay=0.01, micro_batch=256, clip=1.0))


@dataclass
class Run:
    """One run: its name, length and what is looked at on the way."""

    name: str = MISSING
    seed: int = MISSING
    max_steps: int = MISSING
    """Optimizer steps of the head; 0: it stays that of `head.init_from`, and the controller alone is trained."""
    out: str = "runs"
    resume: bool = False
    """Go on with `<out>/<name>` where it stopped."""
    eval_every: int = 100
    """Steps between measurements of real tau; 0: only at the end."""
    eval_data: str = "synth:val"
    eval_prompts: int = 24
    eval_max_new_tokens: int = 64
    samples: int = 4
    """Sample generations shown in the table at each evaluation."""
    save_every: int = 0
    """Steps between resumable checkpoints; 0: only when stopped and between phases."""
    trackers: list[str] = field(default_factory=lambda: ["wandb"])
    """Who is told besides metrics.jsonl: wandb (offline without a login), tensorboard, both or none."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for perf/mfu; default: that of a known GPU in half precision."""
    compile: bool = False
    """torch.compile for the head's MLP in training: the first steps take minutes; needs CUDA or a C++ compiler."""
    keep: int = 2
    """Resumable checkpoints that are kept: where the newest is damaged, the one before takes its place."""


@dataclass
class DeepSpeedNode:
    """The engine."""

    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    bf16: bool = False
    config: str | None = None
    """A DeepSpeed JSON file with anything else; it may not repeat what the recipe says."""


@dataclass
class Recipe:
    """All settings of a run."""

    target: TargetNode
    head: HeadNode
    data: Data
    loss: LossConfig
    optim: Optim
    policy: PolicyNode
    run: Run
    deepspeed: DeepSpeedNode

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.out) / self.run.name

    def as_dict(self) -> dict[str, Any]:
        """Plain containers in the layout of the YAML file."""
        plain = dataclasses.asdict(self)
        head = plain["head"]
        plain["head"] = {**{key: head[key] for key in HEAD_KEYS}, **head["config"]}
        return _lists(plain)

    def save(self, path: Path | str) -> None:
        """Writes the resolved recipe; `load` reads it back to an equal object."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False), encoding="utf-8")
        os.replace(temporary, path)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: YAML file.
        overrides: `key.path=value` items, later ones win.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown, a value is missing, mistyped or impossible.
    """
    raw = _merge_raw(read_yaml(Path(path), _nodes()), overrides)
    head_module = import_head(_head_kind(raw, path))
    schema = _schema(head_module)
    _check_keys(raw, schema, prefix="")
    plain = _typed(schema, raw)
    recipe = _assemble(plain, head_module)
    check(recipe)
    return recipe


def head_kinds() -> list[str]:
    """Names that `head.kind` may take: the files of `mmspec/heads`."""
    names = [module.name for module in pkgutil.iter_modules(mmspec.heads.__path__)]
    return sorted(name for name in names if name not in NOT_A_DRAFT_HEAD and not name.startswith("_"))


def import_head(kind: str) -> ModuleType:
    """The module `mmspec.heads.<kind>`.

    Raises:
        InputError: there is no such file.
    """
    if kind not in head_kinds():
        raise InputError(f"head.kind={kind!r} is unknown; mmspec/heads has: {', '.join(head_kinds()) or 'none'}")
    return importlib.import_module(f"mmspec.heads.{kind}")


def check(recipe: Recipe) -> None:
    """Checks values that types cannot express.

    Raises:
        InputError: the first impossible value.
    """
    _check_numbers(recipe)
    _check_controller_alone(recipe)
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("target.dtype", recipe.target.dtype, ("float32", "bfloat16", "float16", "float64")),
        ("target.placement", recipe.target.placement, ("replicated", "sharded", "offloaded")),
        ("target.quantize", recipe.target.quantize, ("none", "8bit", "4bit")),
        ("data.answers", recipe.data.answers, ("regenerated", "given")),
        ("optim.schedule", recipe.optim.schedule, ("cosine", "linear", "constant")),
        ("policy.optim.schedule", recipe.policy.optim.schedule, ("cosine", "linear", "constant")),
        ("policy.kind", recipe.policy.kind, ("learned", "fixed")),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            raise InputError(f"{key}={value!r} must be one of: {', '.join(allowed)}{_likely(value, allowed)}")
    for i, source in enumerate(recipe.data.sources):
        if source.format is not None and source.format not in FORMATS:
            likely = _likely(source.format, FORMATS)
            raise InputError(f"data.sources[{i}].format={source.format!r} must be one of: {', '.join(FORMATS)}{likely}")
    for name in recipe.run.trackers:
        if name not in TRACKERS:
            raise InputError(f"run.trackers names {name!r}; there are: {', '.join(TRACKERS)}{_likely(name, TRACKERS)}")
    if recipe.run.peak_tflops is not None and not recipe.run.peak_tflops > 0:
        raise InputError(f"run.peak_tflops={recipe.run.peak_tflops} must be greater than 0")
    if recipe.target.quantize != "none" and recipe.target.placement != "replicated":
        raise InputError(
            f"target.quantize={recipe.target.quantize} goes with target.placement=replicated alone, "
            f"not {recipe.target.placement}"
        )
    if recipe.data.features and vars(recipe.head.config).get("rope") == "mrope":
        raise InputError(
            f"head.rope=mrope needs the target's positions, which data.features={recipe.data.features} does not hold; "
            "use head.rope=1d, or leave data.features out"
        )
    if not recipe.data.sources:
        raise InputError("data.sources is empty; give data.train=PATH or a list of {path, weight, limit}")
    _check_answers(recipe.data)
    name = recipe.run.name
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise InputError(f"run.name={name!r} must be a plain folder name; where it goes is run.out")
    engine = recipe.deepspeed
    if engine.zero_stage not in (0, 1, 2, 3):
        raise InputError(f"deepspeed.zero_stage={engine.zero_stage} must be 0, 1, 2 or 3")
    if engine.offload_param and engine.zero_stage != 3:
        raise InputError("deepspeed.offload_param=true needs deepspeed.zero_stage=3")
    if engine.offload_optimizer and engine.zero_stage == 0:
        raise InputError("deepspeed.offload_optimizer=true needs deepspeed.zero_stage of 1 or more")
    if engine.config is not None and not Path(engine.config).is_file():
        raise InputError(f"deepspeed.config={engine.config}: no such file")
    _check_start(recipe.head)
    if recipe.head.init_layer is not None and recipe.target.quantize != "none":
        raise InputError(
            f"head.init_layer={recipe.head.init_layer} copies weights, which target.quantize={recipe.target.quantize} "
            "does not leave whole; give one of the two"
        )


def _check_answers(data: Data) -> None:
    for name in data.drop:
        if name not in DROP_RULES:
            raise InputError(f"data.drop names {name!r}; there are: {', '.join(DROP_RULES)}{_likely(name, DROP_RULES)}")
    for i, instruction in enumerate(data.instructions):
        if not 0 < instruction.share <= 1:
            raise InputError(f"data.instructions[{i}].share={instruction.share} must be above 0 and at most 1")
        if "<image>" in instruction.text:
            raise InputError(f"data.instructions[{i}].text has an <image> mark, but pictures are the records' own")
    if (total := sum(instruction.share for instruction in data.instructions)) > 1 + 1e-9:
        raise InputError(f"the shares of data.instructions add up to {total:g}; 1 is all conversations")
    if not 0 <= data.sampled_share <= 1:
        raise InputError(f"data.sampled_share={data.sampled_share} must be between 0 (all greedy) and 1")
    if not data.temperature > 0:
        raise InputError(f"data.temperature={data.temperature} must be above 0; greedy is data.sampled_share=0")
    if not 0 < data.top_p <= 1:
        raise InputError(f"data.top_p={data.top_p} must be above 0 and at most 1 (off)")
    if data.answers != "regenerated":
        for key in ("instructions", "sampled_share", "answer_head", "answer_method"):
            if getattr(data, key):
                raise InputError(
                    f"data.{key} is about the target's own answers, but data.answers={data.answers}; leave one of the "
                    "two out"
                )
    if data.answer_head and data.answer_method and data.answer_method != "hybrid":
        raise InputError(
            f"data.answer_head and data.answer_method={data.answer_method} both draft; give one, or hybrid for both"
        )
    if data.answer_method == "hybrid" and not data.answer_head:
        raise InputError(
            "data.answer_method=hybrid needs data.answer_head, which drafts where there is nothing to copy"
        )


def _check_controller_alone(recipe: Recipe) -> None:
    """What a run without a step of the head needs, and what a method excludes."""
    policy, steps = recipe.policy, recipe.run.max_steps
    if policy.method is not None and steps:
        raise InputError(f"policy.method={policy.method} needs no head: set run.max_steps=0, not {steps}")
    if steps:
        return
    if policy.kind != "learned":
        raise InputError(f"run.max_steps=0 trains the controller alone: set policy.kind=learned, not {policy.kind}")
    if policy.method is None and recipe.head.init_from is None:
        raise InputError(
            "run.max_steps=0 trains the controller alone: give head.init_from=<run folder> or policy.method"
        )


def _check_start(head: HeadNode) -> None:
    """Where training starts. Whether `head.init_from` is there is asked when training starts."""
    lora = head.lora
    if head.init_from is not None and head.init_layer is not None:
        raise InputError(
            f"head.init_from={head.init_from} and head.init_layer={head.init_layer} are two beginnings; give one"
        )
    if lora.rank and head.init_from is None and head.init_layer is None:
        raise InputError(
            f"head.lora.rank={lora.rank} adapts what is there: give head.init_from=<run folder> or head.init_layer"
        )
    if not 0 <= lora.dropout < 1:
        raise InputError(f"head.lora.dropout={lora.dropout} must be at least 0 and below 1")
    if not lora.modules:
        raise InputError("head.lora.modules is empty; name the head's linear layers, as in [q_proj, v_proj]")


def _check_numbers(recipe: Recipe) -> None:
    at_least: list[tuple[str, float | None, float]] = [
        ("optim.micro_batch", recipe.optim.micro_batch, 1),
        ("optim.accumulate", recipe.optim.accumulate, 1),
        ("optim.warmup", recipe.optim.warmup, 0),
        ("optim.clip", recipe.optim.clip, 0),
        ("optim.weight_decay", recipe.optim.weight_decay, 0),
        ("policy.optim.micro_batch", recipe.policy.optim.micro_batch, 1),
        ("policy.optim.accumulate", recipe.policy.optim.accumulate, 1),
        ("policy.depth", recipe.policy.depth, 1),
        ("policy.width", recipe.policy.width, 1),
        ("policy.budget", recipe.policy.budget, 1),
        ("policy.rollouts", recipe.policy.rollouts, 1),
        ("policy.rollout_batch", recipe.policy.rollout_batch, 1),
        ("policy.steps", recipe.policy.steps, 1),
        ("head.lora.rank", recipe.head.lora.rank, 0),
        ("data.answer_batch", recipe.data.answer_batch, 1),
        ("data.max_new_tokens", recipe.data.max_new_tokens, 1),
        ("data.max_length", recipe.data.max_length, 4),
        ("data.pack", recipe.data.pack, 0),
        ("data.workers", recipe.data.workers, 1),
        ("data.max_bad_share", recipe.data.max_bad_share, 0),
        ("data.max_degenerate_share", recipe.data.max_degenerate_share, 0),
        ("run.max_steps", recipe.run.max_steps, 0),
        ("run.eval_every", recipe.run.eval_every, 0),
        ("run.eval_prompts", recipe.run.eval_prompts, 1),
        ("run.eval_max_new_tokens", recipe.run.eval_max_new_tokens, 1),
        ("run.samples", recipe.run.samples, 0),
        ("run.save_every", recipe.run.save_every, 0),
        ("run.keep", recipe.run.keep, 1),
    ]
    at_least += [
        (f"data.instructions[{i}].max_new_tokens", instruction.max_new_tokens, 1)
        for i, instruction in enumerate(recipe.data.instructions)
    ]
    at_least += [(f"data.sources[{i}].limit", source.limit, 1) for i, source in enumerate(recipe.data.sources)]
    for key, value, low in at_least:
        if value is not None and value < low:
            raise InputError(f"{key}={value} must be at least {low:g}")
    above: list[tuple[str, float]] = [("optim.lr", recipe.optim.lr), ("policy.optim.lr", recipe.policy.optim.lr)]
    above += [("head.lora.alpha", recipe.head.lora.alpha)]
    above += [(f"data.sources[{i}].weight", source.weight) for i, source in enumerate(recipe.data.sources)]
    for key, value in above:
        if not value > 0:
            raise InputError(f"{key}={value} must be greater than 0")
    if recipe.data.text_first is not None and not 0 <= recipe.data.text_first < 1:
        raise InputError(
            f"data.text_first={recipe.data.text_first} must be at least 0 and less than 1, the share of the steps that "
            "see text alone"
        )
    if not 0 <= recipe.optim.ema < 1:
        raise InputError(f"optim.ema={recipe.optim.ema} must be at least 0 (off) and less than 1, as in 0.999")
    if recipe.policy.optim.ema:
        raise InputError(f"policy.optim.ema={recipe.policy.optim.ema}: only the head is averaged (optim.ema); use 0")


def read_yaml(path: Path, nodes: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        nodes: its top-level keys, for the error message alone.

    Raises:
        InputError: the file is missing, or no YAML mapping.
    """
    if not path.is_file():
        near = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        raise InputError(f"recipe {path} does not exist" + (f"; there are: {', '.join(near)}" if near else ""))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is no valid YAML: {_line(error)}") from error
    if not isinstance(raw, dict):
        raise InputError(f"recipe {path} must be a mapping with the nodes {', '.join(nodes)}")
    return raw


def _merge_raw(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The file's containers with the overrides applied, and `data.train` written out as one source."""
    for item in overrides:
        if "=" not in item or item.startswith(("-", "=")):
            raise InputError(f"override {item!r} is not of the form key=value, as in optim.lr=1e-3")
    try:
        merged = OmegaConf.merge(OmegaConf.create(raw), OmegaConf.from_dotlist(list(overrides)))
        plain: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"the recipe or its overrides cannot be read: {_line(error)}") from error
    for node in ("head", "data", "policy"):
        if node in plain and not isinstance(plain[node], dict):
            raise InputError(f"{node} must be a mapping, not {plain[node]!r}")
    data = plain.get("data", {})
    if "train" in data:
        data["sources"] = [{"path": data.pop("train")}]
    return plain


def _head_kind(raw: Mapping[str, Any], path: Path | str) -> str:
    kind = raw.get("head", {}).get("kind")
    if not isinstance(kind, str):
        raise InputError(f"{path}: head.kind is missing; mmspec/heads has: {', '.join(head_kinds()) or 'none'}")
    return kind


def _nodes() -> list[str]:
    return [f.name for f in dataclasses.fields(Recipe)]


def _schema(head_module: ModuleType) -> dict[str, Any]:
    """Structured node by node: the classes whose fields and types the raw containers must fit."""
    viskip = importlib.import_module("mmspec.heads.viskip")
    head_class = dataclasses.make_dataclass(
        "HeadKeys",
        [
            ("kind", str, MISSING),
            ("init_from", str | None, None),
            ("init_layer", int | None, None),
            ("lora", Lora, dataclasses.field(default_factory=Lora)),
            ("blind", bool, False),
        ],
        bases=(_thawed(head_module.Config),),
    )
    controller = _thawed(viskip.Config)
    policy_class = dataclasses.make_dataclass(
        "PolicyKeys",
        [("controller", controller, dataclasses.field(default_factory=controller))],
        bases=(PolicyNode,),
    )
    return {
        "target": TargetNode,
        "head": head_class,
        "data": Data,
        "loss": _thawed(LossConfig),
        "optim": Optim,
        "policy": policy_class,
        "run": Run,
        "deepspeed": DeepSpeedNode,
    }


def _thawed(config: type) -> type:
    """A non-frozen twin of a dataclass: OmegaConf makes nodes of frozen ones read-only, overrides included."""
    hints = typing.get_type_hints(config)
    entries: list[Any] = []
    for item in dataclasses.fields(config):
        if item.default_factory is not dataclasses.MISSING:
            entries.append((item.name, hints[item.name], dataclasses.field(default_factory=item.default_factory)))
        elif item.default is not dataclasses.MISSING:
            entries.append((item.name, hints[item.name], item.default))
        else:
            entries.append((item.name, hints[item.name], MISSING))
    return dataclasses.make_dataclass(config.__name__, entries)


def _check_keys(raw: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> None:
    """Every key of the recipe must be a field; recursion follows dataclasses and lists of dataclasses."""
    for key, value in raw.items():
        if key not in schema:
            extra = ["train"] if prefix == "data." else []
            raise InputError(f"unknown recipe key {prefix}{key}{_likely(str(key), [*schema, *extra])}")
        kind = schema[key]
        arguments = typing.get_args(kind)
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            _check_keys(value, typing.get_type_hints(kind), f"{prefix}{key}.")
        elif arguments and dataclasses.is_dataclass(arguments[0]) and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    _check_keys(entry, typing.get_type_hints(arguments[0]), f"{prefix}{key}[{index}].")


def _typed(schema: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values converted to the fields' types, as plain containers with defaults filled in."""
    plain: dict[str, Any] = {}
    for name, node in schema.items():
        values = raw.get(name)
        if values is not None and not isinstance(values, dict):
            raise InputError(f"{name} must be a mapping, not {values!r}")
        try:
            merged = OmegaConf.merge(OmegaConf.structured(node), OmegaConf.create(values or {}))
            plain[name] = OmegaConf.to_container(merged, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = f"{name}.{error.full_key}" if error.full_key else name
            raise InputError(f"recipe key {key} is missing; give it in the file or as {key}=VALUE") from error
        except OmegaConfBaseException as error:
            key = f"{name}.{error.full_key}" if getattr(error, "full_key", None) else name
            raise InputError(f"recipe key {key}: {_line(error)}") from error
    return plain


def _assemble(plain: dict[str, Any], head_module: ModuleType) -> Recipe:
    """Plain containers to the dataclasses; heads' own checks speak here."""
    viskip = importlib.import_module("mmspec.heads.viskip")
    head, data, policy = dict(plain["head"]), dict(plain["data"]), dict(plain["policy"])
    kind, init_from, init_layer, lora, blind = (head.pop(key) for key in HEAD_KEYS)
    data["sources"] = [Source(**source) for source in data["sources"]]
    data["instructions"] = [Instruction(**instruction) for instruction in data["instructions"]]
    policy["controller"] = _build("policy.controller", viskip.Config, policy["controller"])
    policy["optim"] = _build("policy.optim", Optim, policy["optim"])
    return Recipe(
        target=TargetNode(**plain["target"]),
        head=HeadNode(kind, init_from, _build("head", head_module.Config, head), init_layer, Lora(**lora), blind),
        data=Data(**data),
        loss=_build("loss", LossConfig, plain["loss"]),
        optim=_build("optim", Optim, plain["optim"]),
        policy=PolicyNode(**policy),
        run=Run(**plain["run"]),
        deepspeed=DeepSpeedNode(**plain["deepspeed"]),
    )


def typed_config(name: str, config: type, values: Mapping[str, Any]) -> Any:
    """A `Config` from the values of a YAML node, checked as a recipe is: by key, type, and the class itself.

    Args:
        name: of the node, for error messages.

    Raises:
        InputError: the first key or value that is wrong.
    """
    schema = {name: _thawed(config)}
    _check_keys({name: values}, schema, prefix="")
    return _build("settings", config, _typed(schema, {name: values})[name])


def build_config(name: str, config: type, values: Mapping[str, Any]) -> Any:
    """A `Config` from JSON-like values: lists become tuples where the field says so.

    Raises:
        InputError: `name` says where the values that the class refuses came from.
    """
    return _build(name, config, values)


def _build(name: str, config: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(config)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise InputError(f"{name}: unknown key {unknown[0]!r}{_likely(unknown[0], list(hints))}")
    made = {key: tuple(v) if isinstance(v, list) and _is_tuple(hints[key]) else v for key, v in values.items()}
    try:
        return config(**made)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {_line(error)}") from error


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple or any(typing.get_origin(a) is tuple for a in typing.get_args(hint))


def _lists(value: Any) -> Any:
    """Tuples to lists, all the way down: YAML and JSON know no tuples."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lists(entry) for entry in value]
    return value


def _likely(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _line(error: Exception) -> str:
    """The first sentence of an exception, on one line."""
    text = " ".join(
        part.strip() for part in str(error).splitlines() if "full_key" not in part and "object_type" not in part
    )
    return text or type(error).__name__
