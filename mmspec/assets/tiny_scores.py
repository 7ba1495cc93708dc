"""Scores the embedded target: greedy answers to held-out questions, checked fact by fact."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from mmspec.synth import Sample, check, sample

REQUIRED: dict[str, float] = {
    "colour": 0.95,
    "shape": 0.95,
    "position": 0.95,
    "count": 0.95,
    "word": 0.85,
    "bar": 0.85,
}
"""Least exact accuracy by kind of fact."""


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The stored target in fp32, as any user loads it."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def messages_of(one: Sample, answers: list[str]) -> list[dict[str, Any]]:
    """The conversation up to the question that follows `answers`, with the image in the first turn."""
    messages: list[dict[str, Any]] = []
    for turn, question in enumerate(one.turns[: len(answers) + 1]):
        content = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[turn]}]})
    return messages


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: list[Sample],
    max_new_tokens: int = 320,
    batch_size: int = 50,
) -> list[list[str]]:
    """Greedy answers, each turn seeing the target's own earlier ones.

    Args:
        model: The target.
        processor: Its processor.
        samples: What to answer.
        max_new_tokens: Limit for one turn.
        batch_size: Rows decoded together.

    Returns:
        One list of answers for each sample, one answer for each turn.
    """
    generator: Any = model  # transformers types `generate` for a protocol that mypy finds unmet
    answers: list[list[str]] = [[] for _ in samples]
    for turn in range(max(len(s.turns) for s in samples)):
        rows = [i for i, s in enumerate(samples) if len(s.turns) > turn]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            chats = [messages_of(samples[i], answers[i]) for i in part]
            texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            images = [[samples[i].image] for i in part]
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            with torch.inference_mode():
                ids = generator.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            new = ids[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(part, processor.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i].append(text.strip())
    return answers


def score(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, indices: Mapping[str, Iterable[int]]
) -> dict[str, Any]:
    """Share of right facts and lengths of answers.

    Args:
        model: The target.
        processor: Its processor.
        indices: Which samples of which splits.

    Returns:
        "scores" by kind and "scores_by_topic" by topic, each {right, of, accuracy}; "answer_tokens" by topic, the mean
        over records of the tokens in all turns, </s> included; "images", how many were asked about.
    """
    samples = [sample(split, i) for split, which in indices.items() for i in which]
    answers = answer(model, processor, samples)
    kinds: dict[str, list[bool]] = defaultdict(list)
    topics: dict[str, list[bool]] = defaultdict(list)
    lengths: dict[str, list[int]] = defaultdict(list)
    for one, said in zip(samples, answers, strict=True):
        for fact in one.facts:
            right = check(fact, said[fact.turn])
            # Naming the right option is reading the question, not the image: a kind of its own, reported, not required.
            kinds["option" if fact.expected.startswith("(") else fact.kind].append(right)
            topics[one.topic].append(right)
        tokens = [len(processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) + 1 for text in said]
        lengths[one.topic].append(sum(tokens))
    return {
        "splits": {split: len(list(which)) for split, which in indices.items()},
        "scores": {kind: _share(kinds[kind]) for kind in sorted(kinds)},
        "scores_by_topic": {topic: _share(values) for topic, values in topics.items()},
        "answer_tokens": {topic: round(sum(values) / len(values), 1) for topic, values in lengths.items()},
    }


def _share(values: list[bool]) -> dict[str, float]:
    return {"right": sum(values), "of": len(values), "accuracy": round(sum(values) / len(values), 4)}


def failures(scores: Mapping[str, Any]) -> list[str]:
    """Which required scores were missed, in words; empty if none."""
    lines = []
    for kind, least in REQUIRED.items():
        reached = scores["scores"].get(kind, {"accuracy": 0.0})["accuracy"]
        if reached < least:
            lines.append(f"{kind} {reached:.1%}, at least {least:.0%} is required")
    return lines


def table(scores: Mapping[str, Any]) -> str:
    """The scores for a terminal."""
    lines = [f"{'':24} {'right':>6} {'of':>6} {'accuracy':>9}"]
    for part in ("scores", "scores_by_topic"):
        for name, row in scores[part].items():
            lines.append(f"{name:24} {row['right']:6d} {row['of']:6d} {row['accuracy']:9.1%}")
    lines.append("mean answer tokens: " + ", ".join(f"{t} {n:.0f}" for t, n in scores["answer_tokens"].items()))
    return "\n".join(lines)
