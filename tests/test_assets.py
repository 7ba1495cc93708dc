"""The embedded target: complete, small, loaded like any other, and it sees."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from mmspec.assets import TINY_LLAVA, resolve
from mmspec.assets.tiny_files import EOS, IMAGE, N_IMAGE_TOKENS, make_tokenizer
from mmspec.assets.tiny_scores import REQUIRED, answer, failures, load
from mmspec.synth import CORPUS_VERSION, check, sample

CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is red?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "The star is red."}]},
    {"role": "user", "content": [{"type": "text", "text": "And blue?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Nothing is."}]},
]


@pytest.fixture(scope="module")
def target() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return load(TINY_LLAVA)


def test_resolve_knows_the_embedded_names_only() -> None:
    assert resolve("tiny_llava") == resolve("embedded:tiny_llava") == str(TINY_LLAVA)
    assert resolve("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    assert resolve("./tiny_llava") == "./tiny_llava"


def test_it_is_small_and_stored_in_bf16(target: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
    model, _ = target
    assert sum(p.numel() for p in model.parameters()) <= 7_500_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in TINY_LLAVA.rglob("*")) <= 16_000_000
    stored = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert model.config.text_config.max_position_embeddings == 4096
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.data_ptr() != embedding.data_ptr()


def test_every_required_score_is_reached() -> None:
    assert failures(json.loads((TINY_LLAVA / "provenance.json").read_text(encoding="utf-8"))) == []


def test_provenance_says_how_and_with_which_scores() -> None:
    record = json.loads((TINY_LLAVA / "provenance.json").read_text(encoding="utf-8"))
    assert record["required"] == REQUIRED
    assert record["corpus_version"] == CORPUS_VERSION
    assert all(record["scores"][kind]["of"] >= 50 for kind in REQUIRED)
    assert {"command", "git_commit", "seed", "steps", "wall_s", "machine", "versions", "answer_tokens"} <= set(record)


@pytest.mark.parametrize(
    "text",
    [
        "The red star.",
        "naïve café — 你好, мир! 🙂\t\n  x",
        "\x00\x7f<b>\\frac{1}{2}</b>",
        "  two  spaces ",
        "a\r\nb",
        "12345",
    ],
)
def test_the_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAVA)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_fresh_tokenizer_covers_the_byte_alphabet_without_any_text() -> None:
    tokenizer = make_tokenizer([])
    assert tokenizer.decode(tokenizer("Ω≠ß")["input_ids"], skip_special_tokens=True) == "Ω≠ß"


def test_corpus_words_are_mostly_single_tokens() -> None:
    """The vocabulary is too small for that only if the merges were learnt from other text."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAVA)
    words = [word for i in range(60) for text in sample("testmini", i).answers for word in text.split()]
    tokens = sum(len(tokenizer.tokenize(" " + word)) for word in words)
    assert tokens / len(words) < 1.4  # punctuation is a token of its own


def test_the_chat_template_renders_turns_in_llava_style(
    target: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    _, processor = target
    text = processor.apply_chat_template(CHAT, tokenize=False)
    assert text == (
        "Be kind. USER: <image>\nWhat is red? ASSISTANT: The star is red.</s>USER: And blue? ASSISTANT: Nothing is.</s>"
    )
    asked = processor.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert asked == "Be kind. USER: <image>\nWhat is red? ASSISTANT:"
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert processor.apply_chat_template(plain, tokenize=False) == "USER: Hello ASSISTANT: Hi</s>"


def test_generation_tags_mark_the_answers_with_their_end(
    target: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    """A mask that is off by one would train a head on the last token of the question."""
    _, processor = target
    tokenizer = processor.tokenizer
    encoded = tokenizer.apply_chat_template(
        CHAT,
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    wanted = tokenizer(f" The star is red.{EOS} Nothing is.{EOS}", add_special_tokens=False)["input_ids"]
    assert marked == wanted


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (640, 427)), ("L", (33, 500)), ("RGBA", (96, 96)), ("P", (20, 20)), ("RGB", (1, 1))]
)
def test_the_processor_takes_any_image(
    mode: str, size: tuple[int, int], target: tuple[LlavaForConditionalGeneration, LlavaProcessor]
) -> None:
    _, processor = target
    inputs = processor(text=f"USER: {IMAGE}\nWhat? ASSISTANT:", images=[Image.new(mode, size)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == N_IMAGE_TOKENS


def test_auto_processor_finds_llavas_processor() -> None:
    assert type(AutoProcessor.from_pretrained(TINY_LLAVA)) is LlavaProcessor


def test_training_sees_the_same_tokens_as_the_chat_template(
    target: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    """The build script encodes turn by turn for speed; users render the template and tokenise the whole."""
    _, processor = target
    one = sample("testmini", 55)
    text = f"USER: {IMAGE}\n{one.turns[0]} ASSISTANT: {one.answers[0]}{EOS}"
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.turns[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": one.answers[0]}]},
    ]
    assert processor.apply_chat_template(chat, tokenize=False) == text
    whole = processor(text=text, images=[one.image])["input_ids"][0]
    tokenizer = processor.tokenizer
    parts = [tokenizer.bos_token_id]
    for part in (f"USER: {IMAGE * N_IMAGE_TOKENS}\n{one.turns[0]} ASSISTANT:", f" {one.answers[0]}{EOS}"):
        parts += tokenizer(part, add_special_tokens=False)["input_ids"]
    assert list(whole) == parts


def test_it_really_sees(target: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
    """Twelve held-out questions, four each about shapes, words and charts: the full score is in provenance.json."""
    model, processor = target
    samples = [sample("test", i) for i in (*range(50, 54), *range(150, 154), *range(350, 354))]
    answers = answer(model, processor, samples, max_new_tokens=40)
    right = [check(f, said[f.turn]) for s, said in zip(samples, answers, strict=True) for f in s.facts]
    assert sum(right) / len(right) >= 0.8
