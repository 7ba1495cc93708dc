"""Answer marks: exactly the tokens that a target writes, in every family, whatever template, tokenizer or padding.

`tests/golden/marks_*.json` show a conversation of 4 turns and 2 images in every family, to be read by a person;
`pytest tests/test_marks.py --golden` writes them anew.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from mmspec.targets._rows import Place, fill, lay_out
from mmspec.targets.base import HFTarget
from mmspec.types import InputError, Prompt
from tests import families
from tests.chats import LLAVA_TEMPLATE, NAMES, build, conversation, said

GOLDEN = Path(__file__).parent / "golden"
PUBLIC = "MMSPEC_TARGETS_DATA"
"""A folder with the public templates `llava-1.5.chat_template.jinja` and `qwen2.5-vl.chat_template.jinja`."""
every_target = pytest.mark.parametrize("name", NAMES)


def runs(values: torch.Tensor, long: int = 4) -> str:
    """Numbers as text, stretches of an equal one of at least `long` as `number*count`."""
    out = []
    for value, group in itertools.groupby(values.tolist()):
        count = len(list(group))
        out += [f"{value}*{count}"] if count >= long else [str(value)] * count
    return " ".join(out)


def decode(target: HFTarget, ids: torch.Tensor) -> str:
    return str(target.processor.tokenizer.decode(ids, skip_special_tokens=False))


def folded(target: HFTarget, prompt: Prompt, answer: torch.Tensor) -> str:
    """The text, placeholders of an image as one with their number, replies in brackets."""
    out = []
    for (visual, reply), group in itertools.groupby(
        range(len(prompt)), lambda i: (bool(prompt.visual[i]), int(answer[i]))
    ):
        places = list(group)
        text = f"{target.processor.image_token}*{len(places)}" if visual else decode(target, prompt.input_ids[places])
        out.append(f"⟦{reply}: {text}⟧" if reply else text)
    return "".join(out)


def replies(prompt: Prompt, answer: torch.Tensor) -> list[torch.Tensor]:
    """The ids of each reply; its marks are one stretch."""
    out = []
    for number in range(1, int(answer.max()) + 1):
        places = (answer == number).nonzero().flatten()
        assert torch.equal(places, torch.arange(int(places[0]), int(places[-1]) + 1)), f"reply {number} has gaps"
        out.append(prompt.input_ids[places])
    return out


def shown_stop(target: HFTarget) -> bool:
    """Whether the template itself shows a stop token behind an answer."""
    return any(stop in target._render([said("user", "A"), said("assistant", "A")], False) for stop in target._stops())


def check(target: HFTarget, messages: list[dict[str, Any]], images: list[Any]) -> tuple[Prompt, torch.Tensor]:
    """The laws of marks, for any conversation that can be encoded."""
    prompt, answer = target.encode_dialogue(messages, images)
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    found = replies(prompt, answer)
    assert len(found) == len(places)
    for number, (index, ids) in enumerate(zip(places, found), start=1):
        # What stands before a reply is exactly what a target reads when it is asked for it.
        asked = target.encode(messages[:index], images)
        first = int((answer == number).nonzero()[0])
        assert torch.equal(prompt.input_ids[:first], asked.input_ids)
        assert torch.equal(prompt.visual[:first], asked.visual)
        # And the reply's own tokens say what it says, up to the first stop token.
        text, stops = decode(target, ids), [int(token) in target.stop_ids for token in ids]
        ends = shown_stop(target) or index == len(messages) - 1
        assert stops == [False] * (len(ids) - ends) + [True] * ends
        stop = target._stops()[0] if ends else ""
        words = "".join(part["text"] for part in messages[index]["content"])
        assert text.removesuffix(stop).strip() == words.strip()
        assert text.endswith(stop)
    return prompt, answer


# ---- golden files ----


@every_target
def test_marks_are_those_of_the_golden_file(name: str, request: pytest.FixtureRequest):
    target = build(name)
    prompt, answer = target.encode_dialogue(*conversation())
    found = {
        "text": folded(target, prompt, answer).split("\n"),
        "ids": runs(prompt.input_ids),
        "marks": runs(answer),
    }
    path = GOLDEN / f"marks_{name}.json"
    if request.config.getoption("--golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8"))


@every_target
def test_a_reply_is_what_follows_its_prompt_up_to_its_stop_token(name: str):
    check(build(name), *conversation())


@every_target
def test_every_marked_span_decodes_to_the_answer_and_its_stop_token(name: str):
    target = build(name)
    messages, images = conversation()
    prompt, answer = target.encode_dialogue(messages, images)
    # The embedded target writes the space between its generation prompt and the answer, as a byte of its own.
    lead = " " if name == "tiny_llava" else ""
    stop = target._stops()[0]
    said_texts = [message["content"][0]["text"] for message in messages[1::2]]
    for number, (ids, text) in enumerate(zip(replies(prompt, answer), said_texts), start=1):
        assert decode(target, ids) == lead + text + (stop if shown_stop(target) or number == 4 else "")
    assert name == "llava" or shown_stop(target)


@every_target
def test_what_the_marks_say_goes_through_the_template_to_the_same_tokens(name: str):
    """The round trip: answers are read from the marked tokens alone, and rendered again."""
    target = build(name)
    messages, images = conversation()
    prompt, answer = target.encode_dialogue(messages, images)
    read = [target.decode(ids.tolist()).strip() for ids in replies(prompt, answer)]
    again = [said("assistant", read[k // 2]) if k % 2 else message for k, message in enumerate(messages)]
    other, marks = target.encode_dialogue(again, images)
    assert torch.equal(other.input_ids, prompt.input_ids)
    assert torch.equal(marks, answer)


# ---- padding ----


@every_target
def test_marks_are_the_same_without_padding_and_padded_right_and_left(name: str):
    """The teacher's rows are padded right; a batch that is padded left, as the tokenizer pads, takes the same marks."""
    target = build(name)
    messages, images = conversation()
    rows = [target.encode_dialogue(messages[: 2 * k], images) for k in (4, 1, 2)]
    prompts, answers = [prompt for prompt, _ in rows], [answer for _, answer in rows]
    width = max(map(len, prompts))
    right = lay_out([len(prompt) for prompt in prompts], 0)
    left = [Place(row, width - len(prompt), width) for row, prompt in enumerate(prompts)]
    tokenizer = target.processor.tokenizer
    for side, places in (("right", right), ("left", left)):
        batch = fill(prompts, answers, places, torch.device("cpu"))
        padded = tokenizer.pad(
            {"input_ids": [p.input_ids.tolist() for p in prompts]}, padding_side=side, return_tensors="pt"
        )
        valid = padded["attention_mask"].bool()
        assert torch.equal(batch.segment > 0, valid)
        assert torch.equal(batch.input_ids[valid], padded["input_ids"][valid])
        assert not batch.answer[~valid].any()
        for row, (prompt, answer) in enumerate(rows):
            assert torch.equal(batch.answer[row][valid[row]], answer)
            for number, ids in enumerate(replies(prompt, answer), start=1):
                assert torch.equal(batch.input_ids[row][batch.answer[row] == number], ids)


@every_target
def test_the_tokenizers_own_padding_changes_no_mark(name: str):
    plain = build(name)
    expected = plain.encode_dialogue(*conversation())
    for side in ("left", "right"):
        target = other(plain)
        target.processor.tokenizer.padding_side = side
        target.processor.tokenizer("A", padding="max_length", max_length=400)
        prompt, answer = target.encode_dialogue(*conversation())
        assert torch.equal(prompt.input_ids, expected[0].input_ids)
        assert torch.equal(answer, expected[1])


@pytest.mark.parametrize("name", [*families.MROPE, "tiny_llava"])
def test_marks_need_no_white_space_in_the_spans_of_tokens(name: str):
    """Some tokenizers report a token without the space before it, some report nothing: then beginnings are tried."""
    plain = build(name)
    messages, images = conversation()
    expected = plain.encode_dialogue(messages, images)[1]
    target = other(plain)
    raw = target.processor.tokenizer.backend_tokenizer
    raw.post_processor = processors.Sequence([raw.post_processor, processors.ByteLevel(trim_offsets=True)])
    spaced = target._tokenize("A kite.")[1]
    assert spaced != plain._tokenize("A kite.")[1]
    assert torch.equal(target.encode_dialogue(messages, images)[1], expected)


def other(target: HFTarget, template: str | None = None) -> HFTarget:
    """The same target with a processor of its own, and maybe another chat template."""
    processor = copy.deepcopy(target.processor)
    processor.chat_template = template or processor.chat_template
    return type(target)(target.model, processor, "other")


# ---- any conversation ----

PIECES = st.sampled_from([*"aA .,?!:-\n\t é🌊語", "kite", " sea", "  ", "\n\n", "ASSISTANT:", "INST"])
WORDS = st.lists(PIECES, min_size=1, max_size=10).map("".join).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Up to 4 turns with up to 3 parts each, images anywhere in them; answers begin and end as they like."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append(said("system", draw(WORDS).strip()))
    for _ in range(draw(st.integers(1, 4))):
        messages += [said("user", *draw(st.lists(st.one_of(st.just(""), WORDS), min_size=1, max_size=3)))]
        messages += [said("assistant", draw(WORDS))]
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    return messages, [families.image(k, families.SIZES[k % len(families.SIZES)]) for k in range(count)]


@every_target
@settings(max_examples=60, deadline=None, derandomize=True)
@given(chat=conversations())
def test_any_conversation_is_marked_exactly_or_refused_with_its_message(name: str, chat: Any):
    """Refused where an answer's edge lies within a token: nothing else may go wrong."""
    messages, images = chat
    refusal = ""
    try:
        check(build(name), messages, images)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        number = re.search(r"the answer in message (\d+) (begins|ends) within a token", refusal)
        assert number is not None, refusal
        text = messages[int(number[1]) - 1]["content"][0]["text"]
        assert text != text.strip(), refusal


@every_target
@pytest.mark.parametrize("layout", families.LAYOUTS)
def test_images_stand_anywhere_in_any_turn(name: str, layout: str):
    question, images = families.question(3, layout)
    more, others = families.question(4, layout)
    reply = said("assistant", "A kite.")
    prompt, answer = check(build(name), [*question, reply, *more, reply], [*images, *others])
    assert int(answer.max()) == 2
    assert not answer[prompt.visual].any()


# ---- templates ----

USER, ANSWER = said("user", "What is it?"), said("assistant", "A kite.")
TALK = [USER, ANSWER, said("user", "And?"), said("assistant", "Blue."), said("user", "Sure?"), said("assistant", "Yes")]


def marked(target: HFTarget, messages: Any = TALK) -> list[str]:
    return [decode(target, ids) for ids in replies(*target.encode_dialogue(messages, []))]


def test_generation_tags_make_no_difference():
    with_tags = build("llava")
    without = other(with_tags, LLAVA_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    assert marked(without) == marked(with_tags) == ["A kite.", "Blue.", "Yes</s>"]


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TEXTS = "{% for c in m.content %}{{ c.text }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURN + "{{ m.content[0].text | upper }}<|im_end|>\n{% endfor %}" + PROMPT, "A KITE.<|im_end|>"),
        (TURN + TEXTS + "  <|im_end|>\n{% endfor %}" + PROMPT, "A kite.  <|im_end|>"),
        (TURN + TEXTS + "<|endoftext|>{% endfor %}" + PROMPT, "A kite.<|endoftext|>"),
        ("{{ '' }}" + TURN + "{{ m.content[0].text }}<|vision_end|>{% endfor %}" + PROMPT, "A kite."),
        (
            TURN + TEXTS + "{% if not loop.last or m.role == 'user' %}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT,
            "A kite.<|im_end|>",
        ),
    ],
    ids=["changed", "space before the stop", "another stop", "an end that is no stop", "no end behind the last"],
)
def test_a_reply_goes_to_the_stop_token_that_the_template_shows(template: str, expected: str):
    spans = marked(other(build("qwen2_vl"), template))
    assert spans[0] == expected
    assert spans[2].endswith(("<|im_end|>", "<|endoftext|>"))


def test_a_conversation_that_ends_with_a_question_gets_no_stop_token():
    target = build("llava")
    assert marked(target, TALK[:-1]) == ["A kite.", "Blue."]
    assert target.encode_dialogue([USER], [])[1].sum() == 0


@pytest.mark.parametrize(
    ("template", "message", "reason"),
    [
        (TURN + TEXTS + "<|im_end|>\n{% endfor %}" + PROMPT[:-12] + "<think>{% endif %}", 2, "its own prefix"),
        ("{{ messages | length }}" + TURN + TEXTS + "<|im_end|>\n{% endfor %}" + PROMPT, 2, "its own prefix"),
        (TURN + "{% if loop.index != 4 %}" + TEXTS + "{% endif %}<|im_end|>\n{% endfor %}" + PROMPT, 4, "once"),
        (TURN + TEXTS + "{% if loop.index == 2 %}" + TEXTS + "{% endif %}<|im_end|>\n{% endfor %}" + PROMPT, 2, "once"),
        (
            TURN + TEXTS + "{{ m.content[0].text | length }}<|im_end|>\n{% endfor %}" + PROMPT,
            4,
            "surround all replies alike",
        ),
    ],
    ids=["opens a thought", "counts messages", "drops one", "shows one twice", "counts letters"],
)
def test_a_template_that_hides_where_a_reply_stands_is_refused(template: str, message: int, reason: str):
    with pytest.raises(ValueError, match=f"chat template of other .*{reason}.* at message {message}:"):
        other(build("qwen2_vl"), template).encode_dialogue(TALK, [])


def test_an_answer_whose_edge_lies_within_a_token_is_refused():
    """The prompt ends in a line break, which this tokenizer joins with those that the answer begins with."""
    with pytest.raises(ValueError, match="message 2 begins within a token of public-qwen2_vl"):
        build("qwen2_vl").encode_dialogue([USER, said("assistant", "\nA kite.")], [])
    ends = other(build("qwen2_vl"), TURN + TEXTS + "{{ '\n' }}{% endfor %}" + PROMPT)
    with pytest.raises(ValueError, match="message 2 ends within a token of other"):
        ends.encode_dialogue(TALK, [])


def test_an_answer_that_holds_a_stop_token_is_refused():
    with pytest.raises(ValueError, match="message 2 holds the stop token </s>"):
        build("llava").encode_dialogue([USER, said("assistant", "A <s>kite</s> flies.")], [])


def test_a_template_that_refuses_a_conversation_gives_its_reason():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="template of other refuses the conversation: roles must alternate"):
        other(build("qwen2_vl"), template).encode_dialogue(TALK, [])


@pytest.mark.parametrize("name", families.MROPE)
def test_images_that_the_template_does_not_show_or_the_text_feigns_are_refused(name: str):
    images = [families.image(1, (24, 24))]
    talk = [said("user", "", "What?"), ANSWER]
    with pytest.raises(ValueError, match="shows 0 images of a conversation with 1"):
        other(build(name), TURN + TEXTS + "<|im_end|>\n{% endfor %}" + PROMPT).encode_dialogue(talk, images)
    with pytest.raises(ValueError, match="shows 2 images of a conversation with 1"):
        build(name).encode_dialogue([said("user", "", "What is <|image_pad|>?"), ANSWER], images * 2)
    with pytest.raises(InputError, match="1 images came with it"):
        build(name).encode_dialogue([said("user", "", "", "What?"), ANSWER], images)


@pytest.mark.skipif(PUBLIC not in os.environ, reason=f"set {PUBLIC} to the folder of public chat templates")
@pytest.mark.parametrize(
    ("name", "file"), [("llava", "llava-1.5"), ("llava_next", "llava-1.5"), ("qwen2_5_vl", "qwen2.5-vl")]
)
def test_the_public_templates_mark_exactly_the_answers(name: str, file: str):
    template = (Path(os.environ[PUBLIC]) / f"{file}.chat_template.jinja").read_text(encoding="utf-8")
    plain = build(name)
    target = other(plain, template)
    _, answer = check(target, *conversation())
    if file != "llava-1.5" or name == "llava":
        assert torch.equal(answer, plain.encode_dialogue(*conversation())[1])


# ---- cost ----


class Counting:
    """A processor that counts its calls."""

    def __init__(self, processor: Any) -> None:
        self.inner, self.calls = processor, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **options)


@every_target
def test_the_processor_runs_once_a_conversation(name: str):
    target = other(build(name))
    target.processor = Counting(target.processor)
    target.encode_dialogue(*conversation())
    assert target.processor.calls == 1
