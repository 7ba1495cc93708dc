"""The benchmark of one GPU: its targets, its clock, its page, and the whole of it end to end on small shapes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.synth import sample
from mmspec.tree import root_only
from mmspec.types import Output, Request

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))  # as for a script that is run by its path

import _gpu_page  # noqa: E402
import _random_target  # noqa: E402
import bench_gpu  # noqa: E402
import bench_loop  # noqa: E402


def requests(target: Any, new: int, n: int = 2) -> list[Request]:
    found = []
    for i in range(n):
        one = sample("test", i)
        content = [{"type": "image"}, {"type": "text", "text": one.turns[0]}]
        prompt = target.encode([{"role": "user", "content": content}], [_random_target.picture(one.image)])
        found.append(Request(str(i), prompt, new, i))
    return found


@pytest.mark.parametrize("name", list(_random_target.NAMES))
def test_a_random_target_writes_a_text_that_no_rounding_changes(name: str):
    """In bf16 and fp32, alone and in a batch, drafted for by an oracle or not: a ring of 16 tokens."""
    for dtype in ("float32", "bfloat16"):
        target = _random_target.random_target(name, dtype, "cpu", tiny=True)
        target.stop_ids = frozenset()
        asked = requests(target, 40)
        plain = generate(target, asked, NullDrafter(), SkipPolicy(), GreedySampler(), 2)
        truth = {o.id: o.tokens for o in plain}
        oracle = bench_loop.Oracle(truth, 1.0, target.shape.vocab_size)
        drafted = generate(target, asked, oracle, FixedPolicy(5, 5), GreedySampler(), 2)
        for one, other in zip(plain, drafted):
            assert one.tokens[1:] == _random_target.ring(one.tokens[0], 39) == other.tokens[1:]
            assert len(other.rounds) == 7  # 39 tokens, 6 a round, at most as many as are wanted


def test_a_twin_shares_the_weights_and_computes_the_same():
    target = _random_target.random_target("llava-1.5-7b", "float32", "cpu", tiny=True)
    twin = _random_target.shared_twin(target.model, "eager")
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(target.model.parameters(), twin.parameters()))
    state = target.open(1, 64)
    prompt = requests(target, 4, 1)[0].prompt
    first = target.prefill(state, 0, prompt).logits
    pixels = prompt.pixels["pixel_values"]
    logits = twin(input_ids=prompt.input_ids[None], pixel_values=pixels).logits[:, -1:]
    torch.testing.assert_close(first, logits, rtol=1e-4, atol=1e-3)
    assert target.forward(state, root_only(first.argmax(-1)[:, 0])).logits.isfinite().all()


def test_seconds_of_decoding_leave_prefills_out():
    """Alone: what follows each first token. Together: from the last first token to the last token of all."""

    def output(first: float, last: float) -> Output:
        return Output("0", [1, 2], "length", first, last, [])

    alone = [output(1.0, 3.0), output(0.5, 4.0)]
    assert bench_loop._decoding(alone, 1) == pytest.approx(2.0 + 3.5)
    # The second prefill begins at 1, ends at 2; the first row ends at 7, the second at 1 + 5.
    assert bench_loop._decoding([output(1.0, 7.0), output(1.0, 5.0)], 2) == pytest.approx(7.0 - 2.0)


def found(efficiency: float, measured: float) -> dict[str, Any]:
    """What two parts of a target would have written."""
    row = {"measured": measured, "predicted": 2.0, "mat": 3.0}
    table = {b: {"measured_vs_model": measured / 2, "oracle": {"0.9": row}} for b in ("1", "8", "32")}
    parts = {
        "loop": {"loop_efficiency_b1": efficiency, "loop_efficiency_b8": 0.95, "memory_gb": 1.0},
        "oracle": {"by_batch": table},
    }
    for part in parts.values():
        part["settings"] = {"device": "a <card>", "commit": "c", "torch": "t", "tiny": False}
    return {"targets": {"llava-1.5-7b": parts}, "mid": {}}


def test_what_is_asked_of_a_gpu_is_judged_by_its_figures():
    assert [ok for *_, ok in _gpu_page.verdicts(found(0.91, 1.9))] == [True] * 4
    assert [ok for *_, ok in _gpu_page.verdicts(found(0.89, 1.9))] == [False, True, True, True]
    # Too fast is as far from the prediction as too slow: then it is the prediction that is wrong.
    for measured in (1.7, 2.3):
        assert [ok for *_, ok in _gpu_page.verdicts(found(0.91, measured))] == [True, False, True, False]


def test_the_page_stands_alone_and_shows_every_part_that_is_there():
    text = _gpu_page.page(found(0.91, 1.9))
    assert not re.search(r"<script|<link|src=|https?://(?!www\.w3\.org)", text)
    assert "a &lt;card&gt;" in text
    assert "0.910" in text
    assert "speedup by batch" in text
    assert "training" not in text
    said = _gpu_page.paragraph(found(0.89, 1.9), "cmd")
    assert "loop efficiency at batch 1: 0.890 (not enough)" in said
    assert "measured / predicted speedup at batch 8: 0.950\n" in said
    nothing: dict[str, Any] = {"targets": {}, "mid": {}}
    assert "nothing is measured" in _gpu_page.paragraph(nothing, "cmd")
    assert _gpu_page.page(nothing)


def test_figures_are_gathered_of_what_is_there(tmp_path: Path):
    """Whatever else lies in the folder, as the locks of the ledger."""
    for name, text in {"locks/steps.json": "", "llava-1.5-7b/loop.json": '{"a": 1}', "mid/run/x.json": "{"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for batch in (16, 2):
        (tmp_path / "mid" / f"batch_{batch}").mkdir()
        methods = {"plain": {"overall": {"mat": 1.0}}, "eagle": {"overall": {"mat": 2.0, "speedup": 1.5}}}
        summary = {"methods": methods, "hardware": {"cpu": "c"}, "valid": batch == 2}
        (tmp_path / "mid" / f"batch_{batch}" / "summary.json").write_text(json.dumps(summary))
    gathered = _gpu_page.collect(tmp_path, _random_target.NAMES)
    assert gathered["targets"] == {"llava-1.5-7b": {"loop": {"a": 1}}}
    assert list(gathered["mid"]) == ["2", "16"]
    assert gathered["mid"]["2"]["methods"]["plain"]["mat"] == 1.0
    assert [summary["valid"] for summary in gathered["mid"].values()] == [True, False]
    middle = {"targets": {}, "mid": gathered["mid"]}
    for text in (_gpu_page.page(middle), _gpu_page.paragraph(middle, "cmd")):
        assert text.count("INVALID: answers differ") == 1
    assert _gpu_page.collect(tmp_path / "none", _random_target.NAMES) == {"targets": {}, "mid": {}}


def test_every_step_names_a_script_and_a_file_of_its_own(tmp_path: Path):
    args = bench_gpu._parse(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    steps = bench_gpu.plan(args)
    assert len({step.name for step in steps}) == len({step.makes for step in steps}) == len(steps)
    assert {word for step in steps for word in step.words if word.endswith(".py") and not Path(word).is_file()} == set()
    assert sum(step.name.startswith("mid") for step in steps) == 4
    assert {step.resume for step in steps if step.name.startswith("mid batch")} == {("--resume",)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--minutes", "0", "--tiny"], "--minutes must be above 0"),
        (["--tiny", "--device", "cpu", "--heads", "none"], "there is no recipes/none_llava7b.yaml"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench_gpu.main([*words, "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.slow
def test_the_whole_runs_on_small_shapes_and_goes_on_where_it_was_cut(tmp_path: Path):
    """A first call that has no time for anything, then calls until all is done; the last finds nothing to do."""
    words = ["bash", str(ROOT / "scripts/bench_gpu.sh"), "--here", "--device", "cpu", "--tiny", "--out", str(tmp_path)]

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True, check=False)

    cut = call("--minutes", "0.05")
    assert cut.returncode == bench_gpu.GOES_ON, cut.stderr
    assert "the same command goes on" in cut.stderr
    done = call("--minutes", "20")
    assert done.returncode == 0, done.stderr
    again = call()
    n_steps = len(bench_gpu.plan(bench_gpu._parse(["--tiny", "--device", "cpu", "--out", str(tmp_path)])))
    assert again.stdout.count("done already") == n_steps
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["targets"]) == set(_random_target.NAMES)
    for parts in figures["targets"].values():
        assert {*bench_gpu.DECODE, *(f"train_{kind}" for kind in bench_gpu.HEADS)} == set(parts)
        assert parts["generate"]["same_tokens_as_generate"] == parts["generate"]["same_tokens_as_prompt_lookup"] == 1.0
        mats = [row["mat"] for row in parts["oracle"]["by_batch"]["2"]["oracle"].values()]
        assert mats == sorted(mats)
        assert parts["train_eagle3"]["perf/tokens_per_s"] > 0
    for summary in figures["mid"].values():
        assert set(summary["methods"]) == {"plain", "eagle", "viskip"}
        assert summary["methods"]["eagle"]["exact_match"] == 1.0
    assert "The figures of a GPU are owed" in again.stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000
