"""What each engine's layout can serve: kinds of heads, targets, image inputs, and how it counts the target's layers.

Invariant: whatever an engine would do otherwise than the head was trained is refused here in one line, before anything
is written; what it may do otherwise is a note, which the exported folder keeps.

Source: read in the engines' code, 2026-11: `llama_eagle3.py` of SGLang and vLLM, their runners, vLLM's `medusa.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmspec.checkpoint import Checkpoint
from mmspec.targets import Description
from mmspec.types import InputError


@dataclass(frozen=True)
class Engine:
    """A layout and who reads it.

    Args:
        name: of the engine, for messages.
        kind: file name under `mmspec/heads` of what it serves.
        image_inputs: values of the head's `image_input` that see at image positions there what they saw in training.
        hooks: target families for which the engine hands out the states that the head reads; None: all it serves.
        layer_offset: from the layer ids of the settings to indices into hidden_states. SGLang captures what enters
            layer id + 1, vLLM what enters layer id. Neither adds anything to its default (`default_taps`).
    """

    name: str
    kind: str
    image_inputs: tuple[str, ...]
    hooks: tuple[str, ...] | None
    layer_offset: int = 0


ENGINES = {
    "sglang": Engine("SGLang", "eagle3", ("aux",), ("qwen2_5_vl", "qwen3_vl"), 1),
    "speculators": Engine("vLLM", "eagle3", ("aux",), ("qwen2_5_vl", "qwen3_vl"), 0),
    "vllm-medusa": Engine("vLLM", "medusa", ("none",), None),
}
"""{format: engine}."""

MERGED = ("embeds",)
"""What an SGLang serves that hands its draft the merged image embeddings (`mm_input_embeds`), as newer ones do."""


def default_taps(n_layers: int) -> tuple[int, int, int]:
    """Indices into hidden_states that both engines read where settings name no layers."""
    return 2, n_layers // 2, n_layers - 3


def check(
    format: str, made: Checkpoint, target: Description, head_only: bool = False, merged_images: bool = False
) -> list[str]:
    """Refuses what the engine cannot serve.

    Args:
        format: a key of ENGINES.
        made: the run.
        target: its target.
        head_only: whether a ViSkip controller may be left behind.
        merged_images: whether the engine is an SGLang that gives the draft merged image embeddings.

    Returns:
        Notes for whoever serves it, one line each.

    Raises:
        InputError: see above; or another target than the run's.
    """
    engine, notes = _engine(format), []
    _fitting(made, target)
    if made.kind != engine.kind:
        raise InputError(
            f"--format {format}: {engine.name} serves no {made.kind} head in it, only {engine.kind}; "
            f"{_instead(made.kind)}"
        )
    if made.blind:
        raise InputError(f"{made.folder} is a vision-blind twin, which no engine can blindfold; export the head itself")
    if made.viskip is not None and not head_only:
        raise InputError(
            f"{made.folder} has a ViSkip controller, which {engine.name} cannot run: it drafts the same number of "
            "tokens every round; to serve the head without it say --head-only"
        )
    if merged_images and format != "sglang":
        raise InputError(f"--merged-images is about SGLang; --format {format} is read by {engine.name}, which has none")
    served = MERGED if merged_images else engine.image_inputs
    if made.config.image_input not in served:
        raise InputError(_unseen(made, format, merged_images))
    if engine.hooks is not None and target.family not in engine.hooks:
        notes.append(
            f"{engine.name} has no EAGLE-3 hook for {target.family} targets: nothing there hands out the states that "
            f"this head reads (it has one for {', '.join(engine.hooks)})"
        )
    if engine.kind == "eagle3":
        notes += _positions(format, made, target) + _layers(format, made, target)
    if format == "sglang" and not merged_images:
        notes.append(
            "the head was trained to see the placeholder's embedding at image positions; an SGLang that hands its "
            "draft merged image embeddings shows it others there, and accepts less"
        )
    if format != "sglang":
        notes.append("vLLM drafts one chain, no tree: expect a smaller mean accepted length than this project reports")
    return notes


def _engine(format: str) -> Engine:
    if format not in ENGINES:
        raise InputError(f"--format {format!r} is unknown; there are: {', '.join(ENGINES)}")
    return ENGINES[format]


def _fitting(made: Checkpoint, target: Description) -> None:
    for key in ("hidden_size", "vocab_size", "n_layers"):
        mine, its = getattr(made.target.shape, key), getattr(target.shape, key)
        if mine != its:
            raise InputError(
                f"{made.folder} was made for {made.target.name} with {key} {mine}, but --target {target.name} has {its}"
            )


def _instead(kind: str) -> str:
    for format, engine in ENGINES.items():
        if engine.kind == kind:
            return f"use --format {format}"
    return "no engine serves it with a vision-language target; decode with this project, or train an eagle3 head"


def _unseen(made: Checkpoint, format: str, merged_images: bool) -> str:
    how, name = made.config.image_input, ENGINES[format].name
    if merged_images:
        return f"{made.folder} has image_input {how!r}: with --merged-images the draft sees embeds; leave that out"
    why = {
        "embeds": "ignores image embeddings at the draft's input",
        "none": "does not leave image positions out",
        "compressed": "does not compress the image",
    }[how]
    newer = " (an SGLang that hands its draft merged image embeddings: --merged-images)"
    return (
        f"{made.folder} was trained with image_input {how!r}, and {name} {why}; train with head.image_input=aux"
        f"{newer if format == 'sglang' and how in MERGED else ''}"
    )


def _positions(format: str, made: Checkpoint, target: Description) -> list[str]:
    """Notes on rotary positions.

    Raises:
        InputError: the head counts on three axes, and its target does not.
    """
    if made.config.rope == "mrope":
        if not target.mrope:
            raise InputError(
                f"{made.folder} has rope 'mrope', but {target.name} ({target.family}) counts tokens, so the engine has "
                "no positions on three axes for it; train with head.rope=1d"
            )
        return []
    if target.mrope:
        return [
            f"the head counts tokens (rope 1d) while {target.family} has positions on three axes: an engine that "
            "hands the target's positions to the draft turns it otherwise behind images"
        ]
    return []


def _layers(format: str, made: Checkpoint, target: Description) -> list[str]:
    """Notes on the states that the head reads.

    Raises:
        InputError: the layout has no way to name one of them.
    """
    taps, offset = sorted(made.config.taps), ENGINES[format].layer_offset
    if taps[0] < offset:
        raise InputError(
            f"{made.folder} reads hidden state {taps[0]}, the embeddings, for which {ENGINES[format].name} has no "
            "layer id; train with other head.taps"
        )
    if taps[0] == 0:
        return ["the head reads the embeddings (layer id 0), which some of vLLM's models cannot hand out"]
    if format == "sglang" and tuple(taps) != default_taps(target.shape.n_layers):
        return [
            "layer ids are SGLang's; vLLM reads this layout too, but takes them for the layers before: for vLLM use "
            "--format speculators"
        ]
    return []
