"""Figures against truths that are known beforehand: set acceptance, set seconds, set differences."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eval.bench import Result
from eval.claims import claims
from eval.summary import figures, summarise
from mmspec import metrics
from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.types import Output, Request
from tests import tiny
from tests.drafters import Scripted, known_answers

Twist = Callable[[int, int], int]


def decoded(twist: Twist, depth: int, n: int, new: int) -> tuple[list[Output], list[Output]]:
    """Answers of `new` tokens, ended by no stop token: by a chain drafter of set acceptance, and by plain decoding."""
    target = tiny.llava()
    prompts = [tiny.prompt(target, seed) for seed in range(4 * n)]
    requests = [Request(str(i), prompt, new, key=i) for i, prompt in enumerate(prompts)]
    plain = generate(target, requests, NullDrafter(), SkipPolicy(), GreedySampler(), max_batch=8)
    pairs = [(r, o) for r, o in zip(requests, plain) if o.finish_reason == "length"][:n]
    assert len(pairs) == n, "the random target stops too early"
    asked, plain = [r for r, _ in pairs], [o for _, o in pairs]
    drafter: Any = Scripted(known_answers(asked, plain), twist, target.shape.vocab_size)
    return generate(target, asked, drafter, FixedPolicy(depth, depth), GreedySampler(), max_batch=8), plain


def wrong(true: int, depth: int) -> int:
    return (true + 1) % tiny.VOCAB


@pytest.mark.parametrize("right", [0, 2, 4])
def test_a_drafter_that_is_right_so_many_times_has_that_mat(right: int) -> None:
    new = 1 + 4 * (right + 1)
    outputs, plain = decoded(lambda true, depth: true if depth < right else wrong(true, depth), 4, 3, new)
    assert [o.tokens for o in outputs] == [o.tokens for o in plain]
    assert metrics.mat(outputs) == right + 1
    # A depth is never beyond what is still wanted, so the last round of a drafter that is right cannot exceed it.
    assert metrics.mat_untruncated(outputs) == right + 1
    assert metrics.acceptance_by_depth(outputs) == [1.0] * right
    drafted = sum(entry[1] for output in outputs for entry in output.rounds)
    assert metrics.draft_efficiency(outputs) == 12 * right / drafted


def test_a_drafter_that_is_right_by_chance_has_the_mat_of_the_geometric_series() -> None:
    p, depth = 0.7, 4
    rng = random.Random(0)
    outputs, plain = decoded(lambda true, level: true if rng.random() < p else wrong(true, level), depth, 8, 150)
    assert [o.tokens for o in outputs] == [o.tokens for o in plain]
    whole = [entry for output in outputs for entry in output.rounds if entry[1] == depth]
    share = [sum(entry[2] >= k for entry in whole) / len(whole) for k in range(1, depth + 1)]
    closed = [p**k for k in range(1, depth + 1)]
    for seen, expected in zip(share, closed):
        assert abs(seen - expected) < 4 * math.sqrt(expected * (1 - expected) / len(whole))
    mat = 1 + sum(entry[2] for entry in whole) / len(whole)
    second = sum((2 * k - 1) * p**k for k in range(1, depth + 1))
    error = math.sqrt((second - sum(closed) ** 2) / len(whole))
    assert abs(mat - (1 + sum(closed))) < 4 * error < 0.35


def timed(method: str, group: int, ttft_s: float, decode_s: float, n: int = 11, image: str = "") -> Result:
    output = Output(f"r{group}", list(range(n)), "length", ttft_s, ttft_s + decode_s, [("draft", 4, 1, 2)] * (n // 2))
    match = metrics.Match(None, False)
    image = image or f"i{group}"
    return Result(f"r{group}", "t", image, 1, method, output, "", group, ttft_s + decode_s, match, 9, 4)


def test_set_seconds_give_the_set_speedups() -> None:
    plain = [timed("plain", g, 1.0, 3.0 + g) for g in range(3)]
    mine = [timed("m", g, 1.0, (3.0 + g) / 3) for g in range(3)]
    row = figures(mine, plain, 1, 0)
    assert row["speedup"] == pytest.approx((3 + 12) / (3 + 4))
    assert row["decode_speedup"] == pytest.approx(3.0)
    assert row["decode_speedup_lo"] == pytest.approx(3.0)
    ratios = [(1 + 3 + g) / (1 + (3 + g) / 3) for g in range(3)]
    assert row["speedup_geomean"] == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert row["throughput_ratio"] == pytest.approx(row["speedup"]), "the same tokens"
    assert row["latency_p50_s"] == pytest.approx(1 + 4 / 3)
    assert (row["ttft_p50_s"], row["ttft_p90_s"]) == (1.0, 1.0)
    assert row["tokens_per_s"] == pytest.approx(33 / 7)
    assert (row["n_drafted"], row["n_accepted"]) == (60, 15)
    assert row["energy_j"] is row["energy_per_token_j"] is row["peak_bytes"] is None


def test_of_every_topic_the_macro_average_takes_one_vote() -> None:
    def of(method: str, seconds: float, group: int, topic: str) -> Result:
        made = timed(method, group, 0.0, seconds)
        return Result(**{**vars(made), "topic": topic})

    results = [of("plain", 6.0, g, "a" if g else "b") for g in range(4)]
    results += [of("m", 3.0 if g else 1.0, g, "a" if g else "b") for g in range(4)]
    summary = summarise(results, ["plain", "m"], "m", 1, 0)
    assert summary["methods"]["m"]["overall"]["speedup"] == pytest.approx(24 / 10)
    assert summary["methods"]["m"]["macro"]["speedup"] == pytest.approx((2 + 6) / 2)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """1,000 runs of 60 requests about 40 images: long and short answers, images alike, times noisy."""
    rng = torch.Generator().manual_seed(0)
    clusters = [i % 40 for i in range(60)]
    covered = 0
    for run in range(1000):
        image = 0.4 * torch.randn(40, generator=rng, dtype=torch.float64)[clusters]
        own, noise = 0.5 * torch.randn(2, 60, generator=rng, dtype=torch.float64)
        plain = (image + own).exp()
        method = plain / 2 * (0.6 * noise - 0.5 * 0.09).exp()
        found = metrics.speedup(plain.tolist(), method.tolist(), clusters, n_resamples=1000, seed=run)
        # E[plain] / E[method] is 2: the noise of a method has mean 1.
        covered += found.lo <= 2 <= found.hi
    assert 910 <= covered <= 970, covered


def test_claims_are_held_to_the_level_of_their_family() -> None:
    assert metrics.holm([0.01, 0.04, 0.03, math.nan, 0.9])[:3] == pytest.approx([0.04, 0.09, 0.09])
    assert math.isnan(metrics.holm([0.01, math.nan])[1])
    assert metrics.holm([0.6, 0.7]) == [1.0, 1.0]
    plain = [timed("plain", g, 0.5, 3.0 + g % 5) for g in range(30)]
    fast = [timed("fast", g, 0.5, 1.5 + (g % 5) / 2) for g in range(30)]
    same = [timed("same", g, 0.5, 3.0 + (g + 1) % 5) for g in range(30)]
    found = claims([*plain, *fast, *same], ["plain", "same", "fast"], "fast", 1, 0)
    ratios = {row["method"]: row for row in found["faster_than_plain"]}
    assert ratios["fast"]["p_holm"] == pytest.approx(2 * ratios["fast"]["p"])
    assert ratios["fast"]["p_holm"] < 0.01
    assert ratios["same"]["p"] > 0.5
    (pair,) = found["primary_faster_than"]
    assert (pair["method"], pair["p_holm"]) == ("same", pair["p"])
    assert pair["ratio"] == pytest.approx(ratios["fast"]["ratio"] / ratios["same"]["ratio"])


def test_an_answer_that_differs_makes_the_run_invalid_and_is_named() -> None:
    def run(match: metrics.Match, gap: float) -> dict[str, Any]:
        plain, mine = timed("plain", 0, 1.0, 1.0), timed("m", 0, 1.0, 1.0)
        other = Result(**{**vars(mine), "match": match, "gap": gap})
        return summarise([plain, other], ["plain", "m"], "m", 1, 0)

    bad, tie = run(metrics.Match(3, False), 0.4), run(metrics.Match(3, True), 1e-5)
    assert not bad["valid"]
    assert tie["valid"]
    assert bad["divergences"]["plain"] is None
    assert bad["divergences"]["m"]["first"] == [{"id": "r0", "turn": 1, "at": 3, "gap": 0.4, "tie": False}]
    assert (tie["divergences"]["m"]["count"], tie["divergences"]["m"]["gap_max"]) == (1, 1e-5)
