"""Metrics: hand-computed cases, and simulated runs whose true values are known."""

from __future__ import annotations

import math
import random

import pytest

from mmspec import metrics
from mmspec.types import Output


def output(rounds: list[tuple[str, int, int, int]], n_tokens: int | None = None) -> Output:
    """An output whose token count follows from its rounds: one prefill token, then what was emitted."""
    n = 1 + sum(round[3] for round in rounds) if n_tokens is None else n_tokens
    return Output("x", list(range(n)), "stop", 0.1, 1.0, rounds)


# Two requests by hand. First: prefill token, 3 of 8 accepted + bonus (4), a skip (1), then 5 accepted, the stop token
# second among them (2 kept). Second: two skips and a round that accepted nothing.
FIRST = output([("draft", 8, 3, 4), ("skip", 0, 0, 1), ("draft", 8, 5, 2)])
SECOND = output([("skip", 0, 0, 1), ("skip", 0, 0, 1), ("draft", 4, 0, 1)])


def test_mat_counts_skips_and_bonus_but_neither_the_prefill_token_nor_what_follows_a_stop() -> None:
    assert metrics.mat([FIRST]) == pytest.approx(7 / 3)
    assert metrics.mat([SECOND]) == 1.0
    assert metrics.mat([FIRST, SECOND]) == pytest.approx(10 / 6), "a ratio of totals, not a mean of ratios"


def test_untruncated_mat_counts_the_last_round_whole() -> None:
    assert metrics.mat_untruncated([FIRST]) == pytest.approx((4 + 1 + 6) / 3)
    assert metrics.mat_untruncated([FIRST, SECOND]) == pytest.approx((4 + 1 + 6 + 1 + 1 + 1) / 6)


def test_skip_rate_and_draft_efficiency() -> None:
    assert metrics.skip_rate([FIRST, SECOND]) == 0.5
    assert metrics.draft_efficiency([FIRST, SECOND]) == pytest.approx(8 / 20)


def test_acceptance_by_depth_is_over_drafting_rounds_and_sums_to_tau() -> None:
    by_depth = metrics.acceptance_by_depth([FIRST, SECOND])
    assert by_depth == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3])
    drafting = [output([round for round in o.rounds if round[0] == "draft"]) for o in (FIRST, SECOND)]
    assert 1 + sum(by_depth) == pytest.approx(metrics.mat_untruncated(drafting))


def test_an_answer_that_is_only_its_prefill_token_has_no_mat() -> None:
    empty = output([])
    for figure in (metrics.mat, metrics.mat_untruncated, metrics.skip_rate, metrics.draft_efficiency):
        assert math.isnan(figure([empty]))
    assert metrics.acceptance_by_depth([empty]) == []
    assert metrics.mat([empty, SECOND]) == 1.0, "it must not pull the others down"


def test_percentiles_interpolate() -> None:
    assert metrics.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert metrics.percentile(list(range(11)), 90) == 9.0
    assert math.isnan(metrics.percentile([], 50))


def test_speedup_is_the_ratio_of_totals() -> None:
    result = metrics.speedup([10.0, 2.0], [5.0, 2.0], ["a", "b"])
    assert result.value == pytest.approx(12 / 7)
    assert result.lo == pytest.approx(1.0), "a resample of two can be b twice"
    assert result.hi == pytest.approx(2.0)


def test_speedup_of_one_cluster_has_no_interval() -> None:
    result = metrics.speedup([3.0, 3.0], [1.0, 2.0], ["a", "a"])
    assert result.value == 2.0
    assert math.isnan(result.lo)
    assert math.isnan(result.hi)
    assert math.isnan(metrics.speedup([], [], []).value)


def test_speedup_refuses_unpaired_times() -> None:
    with pytest.raises(ValueError, match="unpaired units: 2, 1 figures"):
        metrics.speedup([1.0, 2.0], [1.0], ["a", "b"])


def test_clustering_widens_the_interval_of_units_that_are_alike() -> None:
    null = [4.0] * 10 + [2.0] * 10
    method = [1.0] * 20
    alike = metrics.speedup(null, method, [i // 5 for i in range(20)])
    apart = metrics.speedup(null, method, list(range(20)))
    assert alike.value == apart.value == 3.0
    assert alike.hi - alike.lo > 1.5 * (apart.hi - apart.lo)


def test_the_same_seed_gives_the_same_interval() -> None:
    times = [random.Random(i).random() for i in range(30)]
    arguments = (times, times[::-1], list(range(30)))
    assert metrics.speedup(*arguments) == metrics.speedup(*arguments)
    assert metrics.speedup(*arguments) != metrics.speedup(*arguments, seed=1)


@pytest.mark.parametrize(
    ("tokens", "gaps", "expected"),
    [
        ([1, 2, 3], [9.0, 9.0, 9.0], metrics.Match(None, False)),
        ([1, 5, 3], [9.0, 9e-5, 9.0], metrics.Match(1, True)),
        ([1, 5, 3], [9e-5, 9.0, 9e-5], metrics.Match(1, False)),
        ([1, 5, 7], [9.0, 9e-5, 9.0], metrics.Match(1, True)),
        ([1, 5, 3], [9.0, 1e-4, 9.0], metrics.Match(1, False)),
        ([1, 5, 3], [], metrics.Match(1, False)),
        ([1, 2], [0.0, 0.0, 0.0], metrics.Match(2, False)),
        ([1, 2, 3, 4], [0.0, 0.0, 0.0], metrics.Match(3, False)),
        ([], [0.0, 0.0, 0.0], metrics.Match(0, False)),
    ],
)
def test_only_the_first_divergence_decides_whether_it_is_a_tie(
    tokens: list[int], gaps: list[float], expected: metrics.Match
) -> None:
    assert metrics.compare(tokens, [1, 2, 3], gaps) == expected


def test_there_are_no_ties_in_fp64() -> None:
    assert metrics.compare([1, 5], [1, 2], [9.0, 0.0], tolerance=0.0) == metrics.Match(1, False)


def test_exact_match_is_identical_or_tie() -> None:
    matches = [metrics.Match(None, False), metrics.Match(3, True), metrics.Match(0, False), metrics.Match(None, False)]
    assert metrics.exact_match(matches) == 0.75
    assert math.isnan(metrics.exact_match([]))


def test_token_sources_account_for_every_token() -> None:
    sources = metrics.token_sources(FIRST.rounds)
    assert sources == ["prefill", "draft", "draft", "draft", "bonus", "skip", "draft", "draft"]
    assert len(sources) == len(FIRST.tokens)


def test_simulated_acceptance_recovers_its_rate() -> None:
    # A drafter accepted at every depth with probability 0.7, chain of 4: E[a] = 0.7 + 0.49 + 0.343 + 0.2401.
    rng = random.Random(1)
    rounds = []
    for _ in range(20000):
        accepted = next((k for k in range(4) if rng.random() > 0.7), 4)
        rounds.append(("draft", 4, accepted, accepted + 1))
    # 20,000 rounds: three standard errors of a share are 0.0106.
    assert metrics.acceptance_by_depth([output(rounds)]) == pytest.approx([0.7, 0.49, 0.343, 0.2401], abs=0.0106)
    assert metrics.mat([output(rounds)]) == pytest.approx(2.7731, abs=0.04)


def test_resamples_that_have_no_figure_do_not_make_it_surer() -> None:
    # Of two clusters one has no rounds: a quarter of the resamples draw it twice, and have no MAT.
    kept, rounds = [3.0, 0.0], [2.0, 0.0]
    interval, p = metrics.contrast((kept, rounds), ["a", "b"], metrics.ratio, 1.5)
    assert (interval.value, interval.lo, interval.hi) == (1.5, 1.5, 1.5)
    assert p == 1.0


def test_drafting_breaks_even_where_it_was_ahead_all_the_way() -> None:
    assert metrics.break_even({4: 1.1, 1: 2.0, 2: 1.5}) == 4
    assert metrics.break_even({1: 2.0, 2: 0.9, 4: 1.1}) == 1, "a lucky large batch does not count"
    for none in (1.0, math.nan, None):
        assert metrics.break_even({1: none, 2: 2.0}) is None
