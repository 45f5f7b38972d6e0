"""The Step Law against worked values, and its properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypost.core.errors import ConfigError
from waypost.plan.laws import Run, Scale
from waypost.plan.laws.step_law import StepLaw


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch"),
    [(1e9, 1e11, 1.66e-3, 1.107e6), (7e9, 1.4e12, 9.35e-4, 5.00e6), (1e8, 2e9, 2.58e-3, 1.19e5), (1.06e8, 1e9, 2.00e-3, 8.0e4)],
)
def test_worked_values(parameters: float, tokens: float, lr: float, batch: float) -> None:
    """Worked from the authors' fits before they were rounded: half a unit of an exponent's last digit is 1% at 1e9."""
    found = StepLaw().predict(Scale(parameters, tokens))
    assert found["lr"] == pytest.approx(lr, rel=0.02)
    assert found["batch_tokens"] == pytest.approx(batch, rel=0.02)


@given(st.floats(1e5, 1e12), st.floats(1e6, 1e14))
def test_larger_models_learn_slower_and_longer_runs_in_larger_steps(parameters: float, tokens: float) -> None:
    sizes = [(parameters, tokens), (2 * parameters, tokens), (parameters, 2 * tokens)]
    at, larger, longer = (StepLaw().predict(Scale(n, d)) for n, d in sizes)
    assert larger["lr"] < at["lr"] < longer["lr"]
    assert larger["batch_tokens"] == at["batch_tokens"] < longer["batch_tokens"]


@given(st.floats(0.1, 10), st.floats(-1, 1), st.floats(0.1, 2))
def test_a_fit_finds_planted_constants(factor: float, power: float, grows: float) -> None:
    law = StepLaw(lr_factor=factor, lr_parameters=power, batch_factor=factor, batch_tokens=grows)
    runs = [Run(Scale(n, d), law.predict(Scale(n, d))) for n in (1e6, 3e8) for d in (1e7, 1e10)]
    found = StepLaw().fit(runs)
    for name in ("lr_factor", "lr_parameters", "lr_tokens", "batch_factor", "batch_tokens"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-6, abs=1e-9)


@given(st.floats(1e5, 1e12), st.floats(1e6, 1e14), st.floats(0.1, 10), st.floats(0.1, 10))
def test_without_exponents_it_says_the_same_of_every_run(parameters: float, tokens: float, lr: float, batch: float) -> None:
    """The neutral setting: its two factors, which are what any law says of one parameter and one token."""
    law = StepLaw(lr_factor=lr, lr_parameters=0.0, lr_tokens=0.0, batch_factor=batch, batch_tokens=0.0)
    assert law.predict(Scale(parameters, tokens)) == {"lr": lr, "batch_tokens": batch}
    assert StepLaw(lr_factor=lr, batch_factor=batch).predict(Scale(1.0, 1.0)) == {"lr": lr, "batch_tokens": batch}


def test_runs_of_one_size_tell_no_law() -> None:
    run = Run(Scale(1e6, 1e8), StepLaw().predict(Scale(1e6, 1e8)))
    with pytest.raises(ConfigError, match="vary parameters and tokens"):
        StepLaw().fit([run, run, run])
    with pytest.raises(ConfigError, match="must be positive"):
        StepLaw(lr_factor=0.0)
