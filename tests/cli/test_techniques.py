"""Techniques of the engine by name on the command line."""

from __future__ import annotations

import pytest

from waypost.cli import main
from waypost.cli._shared import serving_techniques, technique_of
from waypost.core.errors import ConfigError
from waypost.serve.drafting import NGram
from waypost.serve.kv import H2O, POLICIES
from waypost.serve.scheduling import Layered


def test_names_and_fields() -> None:
    assert serving_techniques(None, "none") == {"kv_policy": None, "drafting": None, "policy": None}
    assert serving_techniques(None, "auto")["drafting"] == "auto"
    assert serving_techniques("h2o", "ngram") == {"kv_policy": H2O(), "drafting": NGram(), "policy": None}
    want = {
        "kv_policy": H2O(budget=0.5, stride_tokens=8), "drafting": NGram(num_draft_tokens=3), "policy": Layered(max_groups=4),
    }  # fmt: skip
    assert serving_techniques("h2o:budget=0.5,stride_tokens=8", "ngram:num_draft_tokens=3", "layered:max_groups=4") == want
    assert technique_of("waypost.serve.kv.h2o:H2O:budget=0.5", "kv", POLICIES) == H2O(budget=0.5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("h20", "Did you mean 'h2o'"),
        ("h2o:budgt=1", "Did you mean 'budget'"),
        ("h2o:budget=2", "in"),
        ("budget=2", "NAME:FIELD"),
    ],
)
def test_what_is_no_technique_is_named(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        technique_of(text, "kv", POLICIES)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("autp", "Did you mean 'auto'"),
        ("none:max_ngram=2", "none has no fields"),
        ("max_ngram=2", "NAME:FIELD"),
        ("a.b:C", "load"),
    ],
)
def test_what_is_no_drafter_is_named(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        serving_techniques(None, text)


def test_one_policy_is_chosen_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["serve", "no-such-model", "--scheduling", "layered", "--time-between-tokens", "0.1"])
    assert "choose one policy each" in capsys.readouterr().err
