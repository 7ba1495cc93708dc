"""`model.generate` of transformers, decoded by a Speculator: the arguments users have, and the tokens they would get.

    model = speculator.target.model
    model.generate(**processor(...), max_new_tokens=64, custom_generate=speculator.custom_generate())

Invariant: what `generate` was asked for is done or refused. A logits processor, stopping criterion or setting that the
decode loop does not have raises; nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmspec.loop import generate as decode
from mmspec.sampling import make_sampler
from mmspec.types import Drafter, Emission, InputError, Policy, Prompt, Request, Target

KNOWN_PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "RepetitionPenaltyLogitsProcessor": ("penalty", "repetition_penalty"),
    "NoRepeatNGramLogitsProcessor": ("ngram_size", "no_repeat_ngram"),
}
"""{class of transformers: (its attribute, the argument of `make_sampler` that it is)}."""
KNOWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
IDLE = (
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "token_type_ids",
)
"""What `generate` prepares and the loop has of its own (of the mask only padding is read)."""


def custom_generate(
    target: Any, drafter: Drafter, policy: Policy, streamer: Any | None = None
) -> Callable[..., Tensor]:
    """A callable for `generate(custom_generate=...)`.

    Args:
        target: whose model's `generate` is called.
        drafter, policy: of the Speculator.
        streamer: of transformers; `generate` does not hand its own on to a callable, so give it here. For one row.

    Returns:
        The callable. It returns token ids [B, T], each row its prompt and answer, padded as `generate` pads, and raises
        InputError for what `generate` was asked and the loop has not.
    """

    def generated(
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any] = (),
        stopping_criteria: Sequence[Any] = (),
        generation_config: Any = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        # Pictures are named here, as `generate` leaves alone what a callable names: it would encode them itself.
        given = {"pixel_values": pixel_values, "image_sizes": image_sizes, "image_grid_thw": image_grid_thw}
        pixels = {name: value for name, value in given.items() if value is not None}
        if model is not target.model:
            raise InputError("custom_generate belongs to another model; call generate of speculator.target.model")
        _check(target, logits_processor, stopping_criteria, generation_config, inputs)
        length = next(one.max_length for one in stopping_criteria if type(one).__name__ == "MaxLengthCriteria")
        limit = int(length) - input_ids.shape[1]
        prompts = _prompts(target, input_ids, inputs.get("attention_mask"), pixels)
        requests = [Request(str(row), prompt, limit, row) for row, prompt in enumerate(prompts)]
        if streamer is not None and len(requests) > 1:
            raise InputError(f"a streamer shows one row, but there are {len(requests)}")
        if streamer is not None:
            streamer.put(input_ids.cpu())  # as `generate` does: streamers may skip what they are told first

        def show(emission: Emission) -> None:
            streamer.put(torch.tensor(emission.tokens))  # type: ignore[union-attr]

        outputs = decode(
            target,
            requests,
            drafter,
            policy,
            _sampler(logits_processor, generation_config.do_sample),
            len(requests),
            on_emission=show if streamer is not None else None,
        )
        if streamer is not None:
            streamer.end()
        if failed := [output.error for output in outputs if output.finish_reason == "error"]:
            raise InputError(str(failed[0]))
        by_row = {int(output.id): output.tokens for output in outputs}
        longest = max(len(tokens) for tokens in by_row.values())
        pad = _padding(generation_config)
        answers = [by_row[row] + [pad] * (longest - len(by_row[row])) for row in range(len(requests))]
        return torch.cat([input_ids, torch.tensor(answers, dtype=input_ids.dtype, device=input_ids.device)], 1)

    return generated


def _check(
    target: Target, processors: Sequence[Any], criteria: Sequence[Any], config: Any, inputs: Mapping[str, Any]
) -> None:
    """Refuses what the loop does not have."""
    for kind, given, known in (("processor", processors, KNOWN_PROCESSORS), ("criterion", criteria, KNOWN_CRITERIA)):
        for one in given:
            if type(one).__name__ not in known:
                raise InputError(f"{type(one).__name__} is no {kind} that speculative decoding has; leave it out")
    for name, plain in (("num_beams", 1), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
        if (getattr(config, name, None) or plain) != plain:
            raise InputError(
                f"generate was given {name}={getattr(config, name)}; speculative decoding has {plain} alone"
            )
    stops = {int(id) for one in criteria if type(one).__name__ == "EosTokenCriteria" for id in one.eos_token_id}
    if stops != target.stop_ids:
        raise InputError(
            f"generate was given eos_token_id={sorted(stops)}; the target stops at {sorted(target.stop_ids)}"
        )
    for name, value in inputs.items():
        # Newer versions hand on an empty mapping of what they encoded.
        if value is not None and name not in IDLE and not (isinstance(value, Mapping) and not value):
            raise InputError(f"generate was given {name}, which the decode loop has no use for; leave it out")


def _prompts(target: Target, input_ids: Tensor, mask: Tensor | None, pixels: Mapping[str, Tensor]) -> list[Prompt]:
    """The rows without their padding, each with its own pictures.

    Raises:
        InputError: placeholders without pictures, or rows of which not each has one.
    """
    rows = [ids if mask is None else ids[mask[row].bool()] for row, ids in enumerate(input_ids)]
    visual = [ids == target.image_token_id for ids in rows]
    if not pixels and any(bool(seen.any()) for seen in visual):
        raise InputError("there are image placeholders but no pixel_values; give generate all that the processor made")
    if not pixels or len(rows) == 1:
        return [Prompt(ids.cpu(), seen.cpu(), pixels if seen.any() else {}) for ids, seen in zip(rows, visual)]
    grids = pixels.get("image_grid_thw")
    n_images = len(grids) if grids is not None else len(pixels["pixel_values"])
    if n_images != len(rows) or not all(bool(seen.any()) for seen in visual):
        raise InputError(
            f"{n_images} pictures for {len(rows)} rows: a batch needs one a row; give other rows one by one"
        )
    # Of Qwen's families all pictures' patches lie in a row, as many of each as its grid has.
    sizes = [1] * len(rows) if grids is None else grids.prod(-1).tolist()
    parts = {name: value.split(sizes if name == "pixel_values" else 1) for name, value in pixels.items()}
    return [
        Prompt(ids.cpu(), seen.cpu(), {name: part[row] for name, part in parts.items()})
        for row, (ids, seen) in enumerate(zip(rows, visual))
    ]


def _sampler(processors: Sequence[Any], do_sample: bool) -> Any:
    """The processors of `generate` as a sampler; its noise follows torch's own seed, as `generate`'s does."""
    how: dict[str, Any] = {"temperature": 1.0}
    for one in processors:
        theirs, ours = KNOWN_PROCESSORS[type(one).__name__]
        how[ours] = getattr(one, theirs)
    if not do_sample:
        return make_sampler(**how | {"temperature": 0.0})
    return make_sampler(**how, seed=int(torch.randint(0, 2**31 - 1, ())))


def _padding(config: Any) -> int:
    """What follows a finished row: `generate` pads with the stop token where there is no other."""
    first = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return int(first if config.pad_token_id is None else config.pad_token_id)
