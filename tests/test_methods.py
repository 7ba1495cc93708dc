"""Methods by name: the files are the registry, settings are checked, and what is wrong is one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from mmspec.drafters import hybrid, pld
from mmspec.drafters.null import NullDrafter
from mmspec.methods import HYBRID, configure, make_hybrid, make_method, method_names, read_settings, resolved
from mmspec.types import InputError
from tests.tiny import llava

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "recipes" / "methods" / "training_free.yaml"


def test_every_drafter_file_is_a_method_by_its_name():
    files = {path.stem for path in (ROOT / "mmspec" / "drafters").glob("[!_]*.py")}
    assert set(method_names()) == files - {"null", "hybrid"}
    assert method_names() == sorted(method_names())


@pytest.mark.parametrize("name", method_names())
def test_every_method_is_made_with_a_policy_that_asks_for_what_it_drafts(name):
    config = configure(name)
    _, policy = make_method(name, llava())
    assert (policy.max_depth, policy.max_budget) == (config.depth, config.budget)
    assert config.depth >= 1
    assert config.budget >= config.depth


def test_settings_reach_the_drafter():
    drafter, policy = make_method("pld", llava(), {"num_pred": 4, "prefer": "first"})
    assert drafter.config == pld.Config(num_pred=4, prefer="first")
    assert (policy.max_depth, policy.max_budget) == (4, 4)
    drafter, policy = make_hybrid(
        llava(), NullDrafter(), 6, 30, {"retrieval": "pld", "min_match": 4, "settings": {"max_ngram": 8}}
    )
    assert drafter.retrieval.config == pld.Config(max_ngram=8)
    assert (drafter.min_match, drafter.depth, drafter.budget) == (4, 6, 30)
    assert (policy.max_depth, policy.max_budget) == (10, 30)


def test_resolved_settings_are_complete():
    assert resolved("pld", {"num_pred": 4}) == dataclasses.asdict(configure("pld")) | {"num_pred": 4}
    mixed = resolved(HYBRID, {"retrieval": "pld", "settings": {"max_ngram": 8}})
    assert mixed == {"retrieval": "pld", "min_match": 5, "settings": resolved("pld", {"max_ngram": 8})}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("sum", {}, "method 'sum' is unknown; there are: "),
        ("null", {}, "method 'null' is unknown"),
        ("pld", {"max_ngrm": 3}, "pld.max_ngrm; did you mean 'max_ngram'?"),
        ("pld", {"num_pred": "ten"}, "pld.num_pred: Value 'ten'"),
        ("pld", {"num_pred": 1.5}, "pld.num_pred: Value '1.5'"),
        ("pld", {"num_pred": 0}, "pld: num_pred must be at least 1, got 0"),
        (HYBRID, {"min_match": 0}, "hybrid: min_match must be at least 1, got 0"),
        (HYBRID, {"settings": 3}, "hybrid.settings"),
        (HYBRID, {"retrieval": "sum"}, "method 'sum' is unknown"),
        (HYBRID, {"retrieval": "pld", "settings": {"max_ngrm": 3}}, "did you mean 'max_ngram'?"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(name, settings, said, tmp_path):
    with pytest.raises(InputError) as refused:
        resolved(name, settings)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({name: settings}))
    with pytest.raises(InputError) as again:
        read_settings(path)
    assert str(again.value) == str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("- pld", "must be a mapping"), ("pld: 3", "pld must be a mapping of settings, not 3"), ("a: [", "no valid YAML")],
)
def test_a_file_of_settings_that_is_none(text, said, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_settings(path)
    with pytest.raises(InputError, match="does not exist"):
        read_settings(tmp_path / "nowhere.yaml")


def test_a_retrieval_without_matches_is_refused(monkeypatch):
    monkeypatch.delattr(pld.NGramIndex, "match")
    with pytest.raises(InputError, match=r"hybrid\.retrieval='pld' has no matches to go by"):
        make_hybrid(llava(), NullDrafter(), 3, 6, {"retrieval": "pld"})


def test_the_shipped_settings_are_the_defaults_of_every_method():
    shipped = read_settings(SHIPPED)
    assert set(shipped) == {*method_names(), HYBRID}
    for name, values in shipped.items():
        config = hybrid.Config() if name == HYBRID else configure(name)
        assert values == {key: getattr(config, key) for key in config.__dataclass_fields__}
