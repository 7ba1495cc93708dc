"""The Python API and the terminal chat, on the embedded target with an untrained head: the text is plain decoding's."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.text import Text

import mmspec
from mmspec import chat
from mmspec.checkpoint import DraftTree
from mmspec.synth import sample
from mmspec.targets import load_target
from mmspec.types import Emission, InputError
from tests import tiny


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "untrained"
    return tiny.run_folder(folder, load_target("tiny_llava"), DraftTree(3, 2, 4))


@pytest.fixture(scope="module")
def models(run_folder: Path) -> dict[str, mmspec.Speculator]:
    """One of each policy, in fp64: there equality has no exception."""
    names = ("plain", "fixed", "viskip")
    return {n: mmspec.Speculator.from_pretrained(run_folder, policy=n, dtype="float64") for n in names}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    sample("val", 0).image.save(path)
    return path


PROMPTS = ["What is in the top left of the image?", "Describe this image in detail.", "How many shapes are there?"]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("policy", ["fixed", "viskip"])
def test_every_policy_gives_the_text_of_plain_decoding(models, policy, temperature):
    pictures = [sample("val", i).image for i in range(3)]
    how = {"max_new_tokens": 20, "temperature": temperature, "seed": 4}
    plain = models["plain"].generate(PROMPTS, pictures, **how)
    answers = models[policy].generate(PROMPTS, pictures, max_batch=2, **how)
    assert [a.output.tokens for a in answers] == [a.output.tokens for a in plain]
    assert all(a.text and a.error is None and a.tokens_per_s > 0 for a in answers)


def test_one_question_takes_paths_messages_and_several_pictures(models, picture):
    model = models["fixed"]
    as_text = model.generate(PROMPTS[0], [picture], max_new_tokens=8)
    content = [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]
    as_messages = model.generate([[{"role": "user", "content": content}]], [str(picture)], max_new_tokens=8)
    opened = model.generate(PROMPTS[0], [Image.open(picture)], max_new_tokens=8)
    assert as_text[0].text == as_messages[0].text == opened[0].text
    assert model.generate(PROMPTS[0], [picture, picture], max_new_tokens=4)[0].error is None
    assert model.generate("Hello", max_new_tokens=4)[0].error is None


def test_a_picture_that_cannot_be_read_fails_alone(models, picture, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:200])
    pictures = [picture, damaged, picture, tmp_path / "absent.png"]
    answers = models["fixed"].generate([*PROMPTS, "Hello"], pictures, max_new_tokens=8, max_batch=2)
    alone = models["fixed"].generate([PROMPTS[0], PROMPTS[2]], [picture, picture], max_new_tokens=8)
    assert [answers[0].text, answers[2].text] == [a.text for a in alone]
    assert "damaged.png" in answers[1].error
    assert "absent.png" in answers[3].error
    assert [a.output.finish_reason for a in (answers[1], answers[3])] == ["error", "error"]


def test_prompts_that_are_no_prompts_and_pictures_without_a_place_fail_alone(models, picture):
    blind = [{"role": "user", "content": "What is in the picture?"}]
    place = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    asked = ["Hi", blind, [{"role": "user"}], {"role": "user"}, place, "What is it?"]
    answers = models["fixed"].generate(asked, [None, [picture], None, None, [], picture], max_new_tokens=4)
    assert [a.error is None for a in answers] == [True, False, False, False, False, True]
    assert "0 images in the messages but 1 pictures came with them" in answers[1].error
    assert "1 images in the messages but 0 pictures came with them" in answers[4].error
    assert "KeyError" in answers[2].error


def test_the_one_line_form_and_its_refusals(run_folder, picture):
    text = mmspec.generate(run_folder, PROMPTS[0], [picture], max_new_tokens=4)[0].text
    assert (
        text == mmspec.Speculator.from_pretrained(run_folder).generate(PROMPTS[0], [picture], max_new_tokens=4)[0].text
    )
    with pytest.raises(InputError, match="unknown policy 'fast'; use one of auto"):
        mmspec.Speculator.from_pretrained(run_folder, policy="fast")
    with pytest.raises(InputError, match="2 prompts but images for 1"):
        mmspec.generate(run_folder, ["a", "b"], [picture])
    with pytest.raises(InputError, match="does not exist"):
        mmspec.generate(run_folder / "nothing", "a")
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = mmspec.generat


def test_a_method_needs_no_checkpoint_and_a_hybrid_does(models, run_folder):
    pictures = [sample("val", i).image for i in range(3)]
    plain = models["plain"].generate(PROMPTS, pictures, max_new_tokens=20)
    alone = mmspec.Speculator.from_method("pld", dtype="float64", policy="fixed")
    mixed = {"retrieval": "pld", "min_match": 2}
    both = mmspec.Speculator.from_method("hybrid", ckpt=run_folder, settings=mixed, dtype="float64", policy="fixed")
    for model in (alone, both):
        answers = model.generate(PROMPTS, pictures, max_new_tokens=20, max_batch=2)
        assert [a.output.tokens for a in answers] == [a.output.tokens for a in plain]
        assert any(a.mat > 1 for a in answers)
    with pytest.raises(InputError, match="hybrid needs a checkpoint"):
        mmspec.Speculator.from_method("hybrid", settings=mixed)
    with pytest.raises(InputError, match="method 'pdl' is unknown"):
        mmspec.Speculator.from_method("pdl", target="a/target/that/is/not/there")
    with pytest.raises(InputError, match="did you mean 'num_pred'"):
        mmspec.Speculator.from_method("pld", settings={"num_perd": 3})


def test_chat_drafts_with_a_method(run_folder, picture, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("hybrid: {retrieval: pld}\npld: {num_pred: 3}\n")
    words = [
        "--image",
        str(picture),
        "--max-new-tokens",
        "12",
        "--prompt",
        PROMPTS[0],
        "--dtype",
        "float64",
        "--compare",
    ]
    words += ["--method-settings", str(settings)]
    for method in (["--method", "pld"], ["--method", "hybrid", "--ckpt", str(run_folder)]):
        assert chat.main([*words, *method]) == 0
        assert "without drafting: the same tokens" in capsys.readouterr().out
    for wrong, said in (
        (["--prompt", "a"], "give --ckpt DIR, or --method with one of "),
        ([*words, "--ckpt", str(run_folder)], "--method-settings needs --method"),
        (["--method", "pld", "--policy", "fixed"], "--policy fixed steers a checkpoint's own head"),
        ([*words, "--method", "hybrid"], "hybrid needs a checkpoint"),
        (["--method", "pld", "--top-p", "1.5"], "argument --top-p: must be above 0 and at most 1, got 1.5"),
        (["--method", "pld", "--top-k", "-1"], "--top-k must be at least 0, got -1"),
    ):
        assert chat.main(wrong) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_chat_streams_the_answer_and_compares(run_folder, picture, capsys):
    words = ["--ckpt", str(run_folder), "--image", str(picture), "--max-new-tokens", "12", "--dtype", "float64"]
    assert chat.main([*words, "--prompt", PROMPTS[0], "--policy", "fixed", "--compare"]) == 0
    shown = capsys.readouterr().out
    model = mmspec.Speculator.from_pretrained(run_folder, policy="plain", dtype="float64")
    assert shown.startswith(model.generate(PROMPTS[0], [picture], max_new_tokens=12)[0].text)
    assert "tau" in shown
    assert "without drafting: the same tokens" in shown


def test_chat_holds_a_conversation(run_folder, picture, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n{PROMPTS[2]}\n/image nowhere.png\n\n"))
    words = ["--ckpt", str(run_folder), "--image", str(picture), "--max-new-tokens", "10", "--policy", "plain"]
    assert chat.main(words) == 0
    shown = capsys.readouterr().out
    model = mmspec.Speculator.from_pretrained(run_folder, policy="plain")
    first = model.generate(PROMPTS[0], [picture], max_new_tokens=10)[0].text
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": [{"type": "text", "text": PROMPTS[2]}]},
    ]
    second = model.generate([talk], [picture], max_new_tokens=10)[0].text
    assert shown.index(first) < shown.index(second)
    assert "nowhere.png" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ckpt", "nowhere"], "nowhere does not exist"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--device", "abacus"], "--device 'abacus' is unknown"),
    ],
)
def test_chat_says_what_is_wrong_in_one_line(run_folder, capsys, words, said):
    assert chat.main(["--ckpt", str(run_folder), "--prompt", "Hello", "--policy", "fixed", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mmspec.chat: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_the_painter_colours_each_token_once_and_waits_for_whole_characters():
    pieces: list[Text] = []
    bytes_of = {1: b"a", 2: "\u00e9".encode()[:1], 3: "\u00e9".encode()[1:], 4: b"z"}
    painter = chat.Painter(lambda ids: b"".join(bytes_of[i] for i in ids).decode(errors="replace"), pieces.append)
    request: object = None
    painter(Emission(request, (1,), 0, "prefill"))  # type: ignore[arg-type]
    painter(Emission(request, (1, 2), 1, "draft"))  # type: ignore[arg-type]
    painter(Emission(request, (3,), 0, "skip"))  # type: ignore[arg-type]
    painter(Emission(request, (4, 4, 4), 2, "draft"))  # type: ignore[arg-type]
    painter.flush()
    assert [(p.plain, str(p.style)) for p in pieces] == [
        ("a", chat.STYLES["prefill"]),
        ("a", chat.STYLES["accepted"]),
        ("\u00e9", chat.STYLES["skip"]),
        ("zz", chat.STYLES["accepted"]),
        ("z", chat.STYLES["bonus"]),
    ]
