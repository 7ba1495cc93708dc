"""A sample and its answers as the target reads them: tokens, pictures and answer marks, within the longest length.

Invariant: what is returned has whole pictures only, with exactly their tokens, and marks to learn from; everything else
is a RecordError with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mmspec.losses import valid_pairs
from mmspec.recipe import Data
from mmspec.records import RecordError
from mmspec.types import Prompt, Target
from train.answers import Dialogue
from train.corpus import Picture, Sample


def length_limit(data: Data, target: Target) -> int:
    """The longest conversation, in tokens."""
    return min(target.max_length, data.max_length or target.max_length)


def encode(sample: Sample, dialogue: Dialogue, target: Target, limit: int) -> tuple[Prompt, Tensor]:
    """A conversation as the target reads it.

    Args:
        sample, dialogue: questions and answers.
        limit: longest sequence, in tokens. Text beyond it is cut off, but where a picture would be cut, the
            conversation ends before the turn that shows it.

    Returns:
        Prompt of length L and [L] int64 reply numbers, 0 outside replies and at the stop token of a reply that was
        cut short: the target never wrote that one.

    Raises:
        RecordError: a picture cannot be read, or nothing to learn from is left within the limit.
        ValueError: the target's chat template does not let the answers be located.
    """
    prompt, answer, _ = _encode(sample, dialogue, target, limit)
    return prompt, answer


def fitted(sample: Sample, dialogue: Dialogue, target: Target, limit: int) -> Dialogue:
    """The dialogue without the turns that pictures do not fit, and with its length; raises as `encode` does."""
    prompt, _, turns = _encode(sample, dialogue, target, limit)
    return replace(dialogue, answers=dialogue.answers[:turns], finished=dialogue.finished[:turns], length=len(prompt))


def shown(sample: Sample, dialogue: Dialogue) -> tuple[Picture, ...]:
    """The pictures of the turns that have an answer."""
    contents = [message["content"] for message in sample.messages(dialogue.answers, len(dialogue.answers))]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return sample.pictures[: sum(part["type"] == "image" for part in parts)]


def _encode(sample: Sample, dialogue: Dialogue, target: Target, limit: int) -> tuple[Prompt, Tensor, int]:
    """As `encode`, and the number of turns that are left."""
    images = [picture.open() for picture in shown(sample, dialogue)]
    turns = len(dialogue.answers)
    prompt, answer = target.encode_dialogue(sample.messages(dialogue.answers, turns), images)
    cut = prompt.visual[limit:].nonzero().flatten()
    if len(cut):
        # The turn whose picture is the first not to fit follows the replies before it.
        turns = int(answer[: limit + int(cut[0])].max())
        if not turns:
            raise RecordError(f"pictures of the first turn are longer than the context ({limit} tokens)")
        # Encoded anew, so that pixels are those of the pictures that are left, in whatever form a family has them.
        prompt, answer = target.encode_dialogue(sample.messages(dialogue.answers[:turns], turns), images)
    answer = _only_written(prompt, answer, dialogue.finished[:turns], target.stop_ids)
    if len(prompt) > limit:
        prompt = Prompt(prompt.input_ids[:limit], prompt.visual[:limit], prompt.pixels)
        answer = answer[:limit]
        if not valid_pairs(answer):
            raise RecordError(f"prompt is longer than the context ({limit} tokens)")
    if not bool(answer.any()):
        raise RecordError("nothing of the answers was written by the target")
    return prompt, answer, turns


def _only_written(prompt: Prompt, answer: Tensor, finished: Sequence[bool], stop_ids: frozenset[int]) -> Tensor:
    """The marks without the stop tokens that the template shows but the target did not write."""
    answer = answer.clone()
    for number, ended in enumerate(finished, start=1):
        places = (answer == number).nonzero().flatten()
        if not ended and len(places) and int(prompt.input_ids[places[-1]]) in stop_ids:
            answer[places[-1]] = 0
    return answer
