"""What a recipe says, node by node: the fields are its keys, and their docstrings what they mean."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from mmspec.files import write_text
from mmspec.losses import LossConfig

HEAD_KEYS = ("kind", "init_from", "init_layer", "lora", "blind")
"""Keys of the `head` node that are no field of the head's `Config`."""
FORMATS = ("llava", "messages", "sharegpt")
"""Layouts of conversations that `data.sources.format` may name."""
DROP_RULES = ("empty", "loop", "special", "cut")
"""Kinds of degenerate answers that `data.drop` may name."""
TRACKERS = ("wandb", "tensorboard")


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
    """Of a conversation, in tokens; default: the target's context. Text beyond it is cut off, later turns that do not
    fit are left out, and a record whose first prompt does not is quarantined."""
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
    explore: float = 0.25
    """Share of its rounds that are drafted to any depth, none included, instead of the whole: a controller's own rounds
    begin after such ones."""
    rollouts_from: str | None = None
    """Take the rounds of this run folder, of the same data, drafter and draft, instead of decoding: for a controller
    that reads something else."""
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
        write_text(Path(path), yaml.safe_dump(self.as_dict(), sort_keys=False))


def _lists(value: Any) -> Any:
    """Tuples to lists, all the way down: YAML and JSON know no tuples."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lists(entry) for entry in value]
    return value
