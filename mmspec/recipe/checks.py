"""Whether a recipe makes sense: values that types cannot express, and keys that exclude or need each other."""

from __future__ import annotations

from pathlib import Path

from mmspec.recipe.nodes import DROP_RULES, FORMATS, TRACKERS, Data, HeadNode, Recipe
from mmspec.recipe.settings import did_you_mean
from mmspec.types import InputError


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
            raise InputError(f"{key}={value!r} must be one of: {', '.join(allowed)}{did_you_mean(value, allowed)}")
    for i, source in enumerate(recipe.data.sources):
        if source.format is not None and source.format not in FORMATS:
            likely = did_you_mean(source.format, FORMATS)
            raise InputError(f"data.sources[{i}].format={source.format!r} must be one of: {', '.join(FORMATS)}{likely}")
    for name in recipe.run.trackers:
        if name not in TRACKERS:
            raise InputError(
                f"run.trackers names {name!r}; there are: {', '.join(TRACKERS)}{did_you_mean(name, TRACKERS)}"
            )
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
            raise InputError(
                f"data.drop names {name!r}; there are: {', '.join(DROP_RULES)}{did_you_mean(name, DROP_RULES)}"
            )
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
    optims = (("optim", recipe.optim), ("policy.optim", recipe.policy.optim))
    for node, optim in optims:
        at_least += [(f"{node}.{key}", getattr(optim, key), 1) for key in ("micro_batch", "accumulate")]
        at_least += [(f"{node}.{key}", getattr(optim, key), 0) for key in ("warmup", "clip", "weight_decay")]
    at_least += [
        (f"data.instructions[{i}].max_new_tokens", instruction.max_new_tokens, 1)
        for i, instruction in enumerate(recipe.data.instructions)
    ]
    at_least += [(f"data.sources[{i}].limit", source.limit, 1) for i, source in enumerate(recipe.data.sources)]
    for key, value, low in at_least:
        if value is not None and value < low:
            raise InputError(f"{key}={value} must be at least {low:g}")
    above: list[tuple[str, float]] = [(f"{node}.lr", optim.lr) for node, optim in optims]
    above += [("head.lora.alpha", recipe.head.lora.alpha)]
    above += [(f"data.sources[{i}].weight", source.weight) for i, source in enumerate(recipe.data.sources)]
    for key, value in above:
        if not value > 0:
            raise InputError(f"{key}={value} must be greater than 0")
    for node, optim in optims:
        if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
            raise InputError(f"{node}.betas={list(optim.betas)} must be two numbers, each at least 0 and less than 1")
    shares = [("sampled_share", recipe.policy.sampled_share), ("explore", recipe.policy.explore)]
    for name, share in shares:
        if not 0 <= share <= 1:
            raise InputError(f"policy.{name}={share} must be between 0 (none) and 1 (all)")
    if recipe.data.text_first is not None and not 0 <= recipe.data.text_first < 1:
        raise InputError(
            f"data.text_first={recipe.data.text_first} must be at least 0 and less than 1, the share of the steps that "
            "see text alone"
        )
    if not 0 <= recipe.optim.ema < 1:
        raise InputError(f"optim.ema={recipe.optim.ema} must be at least 0 (off) and less than 1, as in 0.999")
    if recipe.policy.optim.ema:
        raise InputError(f"policy.optim.ema={recipe.policy.optim.ema}: only the head is averaged (optim.ema); use 0")
