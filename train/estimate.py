"""What a recipe will need, worked out from shapes alone: parameters, bytes on disk, operations and time.

Invariant: no weights are read, nothing is downloaded and nothing is written; modules are built on the meta device. What
is not known before the data are read is an assumption with a name (`Assumed`), and is printed. Memory is counted by
`train.memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mmspec import checkpoint
from mmspec.recipe import Recipe
from train import memory
from train.features import token_bytes
from train.flops import Cost, expected, head_cost, target_cost
from train.memory import HeadFacts, head_facts, longest_tokens, worst
from train.shapes import BYTES, TargetFacts, target_facts

GIB = 2**30
SLOWER = {"none": 1.0, "8bit": 1.6, "4bit": 1.3}
"""Time of the target's pass with quantised weights, of what it takes without: every product widens them again."""


@dataclass(frozen=True)
class Assumed:
    """What shapes do not say.

    Args:
        tokens: of a conversation on average, 0: half of the longest; lengths are taken to be uniform around it.
        answers: share of a conversation's tokens that are answers, on average.
        tflops: 10^12 operations a second of one device at its best, in the dtype of training.
        utilisation: share of them that is reached.
        link_gb_s: 10^9 bytes a second between devices, each way.
        host_gb_s: between a device and its host's memory.
        host_adam: parameters a second that AdamW updates on the host.
        memory_gb_s: 10^9 bytes a second that a device reads its own memory with at best; `utilisation` of them when a
            target answers questions, token by token.
    """

    tokens: int = 0
    answers: float = 0.5
    tflops: float = 312.0
    utilisation: float = 0.4
    link_gb_s: float = 100.0
    host_gb_s: float = 20.0
    host_adam: float = 1e9
    memory_gb_s: float = 2000.0


@dataclass(frozen=True)
class Sizes:
    """A recipe's modules.

    Args:
        target: the frozen model.
        head: the trained one.
        cost: operations of its training step.
        n_controller: parameters of the ViSkip controller, 0 without one.
    """

    target: TargetFacts
    head: HeadFacts
    cost: Cost
    n_controller: int


def sizes(recipe: Recipe) -> Sizes:
    """Sizes of what a recipe trains, and of its target.

    Raises:
        InputError: the target is unknown, or the head does not fit it.
    """
    facts = target_facts(recipe.target.name)
    config = recipe.head.config.resolve(facts.shape)
    n_controller = 0
    with torch.device("meta"):
        module = checkpoint.build_head(recipe.head.kind, config, recipe.loss)
        head, steps = head_facts(recipe.head.kind, module, facts), recipe.loss.steps
        # Of another family: every weight at every simulated step, forward and twice backward.
        cost = head_cost(module, facts.shape, steps) if head.exact else Cost(drafts=6.0 * head.n * steps)
        if recipe.policy.kind == "learned":
            controller = checkpoint.build_controller(recipe.policy.controller.resolve(facts.shape))
            n_controller = sum(p.numel() for p in controller.parameters())
    return Sizes(facts, head, cost, n_controller)


# ---- operations and time ----


@dataclass(frozen=True)
class Work:
    """Operations (a multiplication and an addition are two) and seconds of one optimizer step on one process.

    Args:
        target: of the frozen model's passes.
        head: of the head's forward and backward passes, vocabulary losses included.
        tokens: of its conversations, without padding.
        target_s, head_s: at the assumed rate.
        moved_s: gradients, weights and offloaded state on their ways; nothing is taken to overlap.
    """

    target: float
    head: float
    tokens: float
    target_s: float
    head_s: float
    moved_s: float

    @property
    def flops(self) -> float:
        """All operations."""
        return self.target + self.head

    @property
    def seconds(self) -> float:
        """All of the step."""
        return self.target_s + self.head_s + self.moved_s


def answer_seconds(recipe: Recipe, sized: Sizes, processes: int, assumed: Assumed) -> float:
    """Seconds in which the target answers the training questions: every token of a batch reads all weights, which
    are widened where they are quantised."""
    if recipe.data.answers != "regenerated" or recipe.data.features:
        return 0.0
    facts, rate = sized.target, assumed.utilisation * assumed.tflops * 1e12
    mean = mean_tokens(recipe, facts, assumed)
    n = conversations(recipe) or recipe.run.max_steps * recipe.optim.micro_batch * recipe.optim.accumulate * processes
    tokens = n / processes * min(mean * assumed.answers, recipe.data.max_new_tokens)
    read = facts.n_parameters * BYTES[recipe.target.dtype] / (assumed.memory_gb_s * 1e9 * assumed.utilisation)
    moved = moved_target(recipe, facts, processes, assumed)
    prefill = target_operations(facts, n / processes, mean * (1 - assumed.answers)) / rate
    return SLOWER[recipe.target.quantize] * (tokens / recipe.data.answer_batch * (read + moved) + prefill)


def mean_tokens(recipe: Recipe, facts: TargetFacts, assumed: Assumed) -> int:
    """Tokens of a conversation on average."""
    longest = longest_tokens(recipe, facts)
    return min(assumed.tokens or max(longest // 2, min(longest, facts.visual_tokens + 64)), longest)


def work(recipe: Recipe, sized: Sizes, processes: int, assumed: Assumed) -> Work:
    """Operations and time of a step."""
    facts, optim = sized.target, recipe.optim
    mean, longest = mean_tokens(recipe, facts, assumed), longest_tokens(recipe, facts)
    lowest = max(2 * mean - longest, 1)
    padded = float(mean)
    if optim.micro_batch > 1 and not recipe.data.pack:
        # Neighbours in length share a micro-batch, which is as wide as its longest.
        padded = lowest + (longest - lowest) * (optim.accumulate + 1) / (2 * optim.accumulate)
    each = optim.micro_batch * optim.accumulate
    target = 0.0 if recipe.data.features else target_operations(facts, each, padded)
    answers, visual = max(mean * assumed.answers, 1), min(facts.visual_tokens, mean)
    trained = float(sized.cost.of(expected(each, mean, answers, recipe.loss.steps, visual)))
    rate = assumed.tflops * 1e12 * assumed.utilisation
    moved = moved_seconds(recipe, sized, processes, assumed)
    slower = SLOWER[recipe.target.quantize]
    return Work(target, trained, each * mean, slower * target / rate, trained / rate, moved)


def target_operations(facts: TargetFacts, n: float, tokens: float) -> float:
    """Operations of the target over n conversations with one picture each; no logits."""
    return float(
        target_cost(facts.shape).of(expected(n, tokens, 0, 1)) + n * 2 * facts.n_vision_parameters * facts.patches
    )


def moved_seconds(recipe: Recipe, sized: Sizes, processes: int, assumed: Assumed) -> float:
    """Seconds that a step spends on moving: all-reduced gradients, gathered weights, what lives on the host."""
    node, n, half = recipe.deepspeed, sized.head.n, 2 if recipe.deepspeed.bf16 else 4
    others = (processes - 1) / processes
    link, host = assumed.link_gb_s * 1e9, assumed.host_gb_s * 1e9
    micro = recipe.optim.accumulate
    # Stages 0 and 1 reduce once a step, 2 and 3 with every micro-batch; 3 gathers for each forward and backward pass.
    seconds = 2 * n * half * others * (micro if node.zero_stage >= 2 else 1) / link
    if node.zero_stage == 3:
        seconds += n * half * others * 2 * micro / link
    if node.offload_optimizer:
        part = n / processes
        seconds += 2 * part * half / host + part / assumed.host_adam
    if node.offload_param:
        seconds += n / processes * half * 2 * micro / host
    if not recipe.data.features:
        seconds += micro * moved_target(recipe, sized.target, processes, assumed)
    return seconds


def moved_target(recipe: Recipe, facts: TargetFacts, processes: int, assumed: Assumed) -> float:
    """Seconds of a pass that the target's layers are on their way, where they are not on the device."""
    frozen = facts.n_layers_parameters * BYTES[recipe.target.dtype]
    if recipe.target.placement == "sharded":
        return frozen * (processes - 1) / processes / (assumed.link_gb_s * 1e9)
    return frozen / (assumed.host_gb_s * 1e9) if recipe.target.placement == "offloaded" else 0.0


# ---- disk ----


def run_folder(recipe: Recipe, sized: Sizes) -> list[tuple[str, int]]:
    """(what, bytes) of the run folder."""
    half, n = 2 if recipe.deepspeed.bf16 else 4, sized.head.n
    # Weights, both moments and the averaged weights in fp32; the newest is written before the oldest goes.
    saved = n * (16 if recipe.optim.ema else 12) * (recipe.run.keep + 1)
    rows = [("head + controller", n * half + sized.n_controller * 4), ("resumable state", saved)]
    if recipe.policy.kind == "learned":
        # A round emits about three tokens; per round mainly one state of the target is stored.
        rounds = recipe.policy.rollouts * recipe.data.max_new_tokens // 3
        rows.append(("rollout", rounds * sized.target.shape.hidden_size * BYTES[recipe.target.dtype]))
    return [*rows, ("total", sum(size for _, size in rows))]


def store_bytes(recipe: Recipe, sized: Sizes, stored_as: str, assumed: Assumed) -> int:
    """Bytes of a FeatureStore of 1,000 conversations with a picture each, stored once."""
    shape = sized.target.shape
    state = token_bytes(shape, sized.head.n_taps, stored_as)
    picture = token_bytes(shape, 0, stored_as) - 7
    return 1000 * (mean_tokens(recipe, sized.target, assumed) * state + sized.target.visual_tokens * picture)


def conversations(recipe: Recipe) -> int | None:
    """Records that the recipe trains on, where it says so for all its sources."""
    limits = [source.limit for source in recipe.data.sources]
    return None if None in limits else sum(limit for limit in limits if limit)


# ---- the report ----


def report(recipe: Recipe, processes: int, assumed: Assumed | None = None) -> str:
    """The resolved recipe with parameters, memory of a process, disk, operations and time, as text.

    Raises:
        InputError: see `sizes`.
    """
    return f"{_yaml(recipe)}\n{summary(recipe, sizes(recipe), processes, assumed or Assumed())}"


def summary(recipe: Recipe, sized: Sizes, processes: int, assumed: Assumed) -> str:
    """`report` without the recipe."""
    facts, head, optim = sized.target, sized.head, recipe.optim
    held = memory.count(recipe, facts, head, worst(recipe, facts), processes, decoding=True)
    step, mean = work(recipe, sized, processes, assumed), mean_tokens(recipe, facts, assumed)
    batch, steps = processes * optim.micro_batch * optim.accumulate, recipe.run.max_steps
    n, fulls = conversations(recipe), held.moments[held.fullest]
    rough = "" if head.exact else "   (counted as if it were of EAGLE's family)"
    if recipe.head.lora.rank:
        rough += "   (of which adapters alone are trained: counted as if all were)"
    whole = f", all {n:,}" if n else ", data"
    answering = answer_seconds(recipe, sized, processes, assumed) / 3600
    lines = [
        f"processes            {processes}   (global batch {batch} = {processes} x micro_batch {optim.micro_batch} "
        f"x accumulate {optim.accumulate})",
        f"target               {recipe.target.name}: {_count(facts.n_parameters)} parameters, frozen ({facts.origin})",
        f"head                 {recipe.head.kind}: {_count(head.n)} parameters, trained ({head.n:,}){rough}",
        f"controller           {_count(sized.n_controller)} parameters ({sized.n_controller:,})",
        f"memory per process   of a training step at its fullest moment, {held.fullest}, with conversations of "
        f"{longest_tokens(recipe, facts):,} tokens",
        *(_row(what, size) for what, size in fulls.items()),
        _row("total", held.total(held.fullest)),
        *(_row(f"{what} (host)", size) for what, size in held.host.items()),
        "other moments",
        *(_row(name, held.total(name)) for name in held.moments if name != held.fullest),
        "disk, run folder     (estimate)",
        *(_row(what, size) for what, size in run_folder(recipe, sized)),
        f"disk, features       if stored: per 1,000 conversations of {mean:,} tokens{whole if n else ''}",
        *(_features(recipe, sized, kind, assumed, n) for kind in ("bfloat16", "float8")),
        f"operations           {step.flops:.3g} FLOPs a step and process (target {step.target:.3g}, head "
        f"{step.head:.3g}), {step.flops * processes * steps:.3g} in all",
        f"time                 {step.seconds * steps / 3600:.1f} hours for {steps:,} steps of {step.seconds:.2f} s"
        f" and {answering:.1f} for answers, at {assumed.utilisation:.0%} of {assumed.tflops:g} TFLOP/s and "
        f"{assumed.memory_gb_s:g} GB/s",
        *(f"data                 {source.path}{_presence(source.path)}" for source in recipe.data.sources),
    ]
    return "\n".join(lines)


def _features(recipe: Recipe, sized: Sizes, stored_as: str, assumed: Assumed, n: int | None) -> str:
    size = store_bytes(recipe, sized, stored_as, assumed)
    return _row(stored_as, size) + (f"{size_text(size * n // 1000)}" if n else "")


def _row(what: str, size: int) -> str:
    return f"  {what:<25}{size_text(size)}"


def _yaml(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(recipe.as_dict(), sort_keys=False)


def _presence(path: str) -> str:
    return "" if path.startswith(("synth:", "hub:")) or Path(path).exists() else "   (not here yet)"


def _count(n: int) -> str:
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= limit:
            return f"{n / limit:.2f} {unit}"
    return str(n)


def size_text(n: int) -> str:
    """Bytes for the eye, 12 columns wide."""
    return f"{n / GIB:8.2f} GiB" if n >= GIB // 10 else f"{n / 2**20:8.1f} MiB"
