"""Loss-based reweighting: its factors against the equation, the step it makes, and that layouts do not matter to it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_cases import ROWS, SEQ_LEN, Rows, named
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.rng import stream_seed
from waypost.model.decoder import Decoder
from waypost.model.head import token_log_probs
from waypost.testing.frozen import difference, frozen
from waypost.train.accounting import step_line
from waypost.train.batch_sizes.fixed import Fixed
from waypost.train.memory import Plain
from waypost.train.objectives import Causal, Objective, Ul2
from waypost.train.optimizers import AdamW
from waypost.train.parallel import Share, Single, World
from waypost.train.reweighing import Reweigher
from waypost.train.reweighting import LossBased
from waypost.train.schedules import Wsd
from waypost.train.trainer import StepReport, Trainer

STRATEGIES = ("linupper", "quadratic", "extremes")
LOSSES = st.lists(st.tuples(st.floats(0.01, 20), st.integers(1, 500)), min_size=1, max_size=12)


def reference(losses: list[float], weights: list[float], strategy: str, r: float) -> list[float]:
    """The authors' trainer, one number at a time, normalised so that the weights add up to what they did."""
    low, high = min(losses), max(losses)
    scores = []
    for loss in losses:
        h = 2.0 * loss / max(high - low, 1e-6) - (high + low) / max(high - low, 1e-6)
        scores.append({"linupper": min(h + 1.0, 1.0), "quadratic": 1.0 - h * h, "extremes": abs(h)}[strategy])
    g = [math.exp((f - max(scores)) / r) for f in scores]
    whole = sum(a * b for a, b in zip(g, weights, strict=True))
    return [a * sum(weights) / whole for a in g]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [0.4, 1.0, 7.0])
def test_golden(strategy: Any, r: float) -> None:
    losses, weights = [3.0, 1.5, 4.0, 2.0, 3.6, 1.0], [5.0, 128.0, 1.0, 0.5, 64.0, 128.0]
    found = LossBased(strategy=strategy, temperature=r).factors(
        torch.tensor(losses, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    )
    assert found.tolist() == pytest.approx(reference(losses, weights, strategy, r), rel=1e-14)


@given(LOSSES, st.sampled_from(STRATEGIES), st.floats(0.05, 50))
def test_the_weights_add_up_to_what_they_did(given: list[tuple[float, int]], strategy: Any, r: float) -> None:
    losses, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*given, strict=True))
    found = LossBased(strategy=strategy, temperature=r).factors(losses, weights)
    assert float((found * weights).sum()) == pytest.approx(float(weights.sum()), rel=1e-12)
    assert bool((found > 0).all())


@given(LOSSES, st.floats(0.1, 10), st.floats(-5, 5))
def test_a_scale_and_a_shift_of_all_losses_change_nothing(given: list[tuple[float, int]], scale: float, shift: float) -> None:
    losses, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*given, strict=True))
    if float(losses.max() - losses.min()) < 1e-3:
        return
    found = [LossBased().factors(x, weights) for x in (losses, losses * scale + shift)]
    assert torch.allclose(found[0], found[1], rtol=1e-8)


@given(LOSSES, st.sampled_from(STRATEGIES), st.floats(0.05, 50), st.floats(0.01, 20), st.integers(0, 10**9))
def test_equal_losses_and_an_infinite_temperature_count_alike(
    given: list[tuple[float, int]], strategy: Any, r: float, loss: float, tokens: int
) -> None:
    """The neutral settings, to the bit."""
    losses, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*given, strict=True))
    alike = LossBased(strategy=strategy, temperature=r).factors(torch.full_like(losses, loss), weights)
    infinite = LossBased(strategy=strategy, temperature=None)
    assert torch.equal(alike, torch.ones_like(losses))
    assert torch.equal(infinite.factors(losses, weights), torch.ones_like(losses))
    assert not infinite.active(tokens)


def trainer(
    reweighting: LossBased | None, micro_rows: int = ROWS, objective: Objective | None = None, rows: Any = None
) -> Trainer:
    model = named("tied", "fp32")
    return Trainer(
        model=model, optimizer=AdamW(lr=1e-2).build(list(model.named_parameters())), stream=rows or Rows(),
        objective=objective or Causal(), schedule=Wsd(), batch_size=Fixed(tokens=ROWS * SEQ_LEN), memory=Plain(),
        parallel=Single(), world=World(), micro_tokens=micro_rows * SEQ_LEN, reweighting=reweighting,
    )  # fmt: skip


def stepped(run: Trainer) -> tuple[StepReport, dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    run.before_state_mutation = lambda: seen.update({n: p.grad.clone() for n, p in run.model.named_parameters()})  # type: ignore[union-attr]
    return run.step(), seen


@pytest.mark.parametrize("neutral", [LossBased(temperature=None), LossBased(after_tokens=1)])
def test_neutral_is_plain_cross_entropy_to_the_bit(neutral: LossBased) -> None:
    (plain, want), (report, found) = stepped(trainer(None, 4)), stepped(trainer(neutral, 4))
    assert (report.loss, report.grad_norm, report.extra) == (plain.loss, plain.grad_norm, plain.extra)
    assert difference(frozen(found), frozen(want)) is None


def test_equal_losses_are_plain_cross_entropy_to_the_bit() -> None:
    """Weights of zero in the head: every token has the same loss, so all factors are one, through the whole machinery."""

    def flat(reweighting: LossBased | None) -> Any:
        run = trainer(reweighting, 4)
        with torch.no_grad():
            run.model.model.embed_tokens.weight.zero_()
        return stepped(run)

    (plain, want), (report, found) = flat(None), flat(LossBased())
    assert report.loss == plain.loss
    assert report.extra["effective_tokens_frac"] == 1.0
    assert difference(frozen(found), frozen(want)) is None


def whole_step(model: Decoder, technique: LossBased, batch: Batch) -> tuple[float, dict[str, Tensor], list[float]]:
    """The step's loss and gradient by autograd over all rows at once, in float64, from the equation."""
    assert batch.weights is not None
    losses, weights = -token_log_probs(model, batch).double(), batch.weights.double()
    spans = list(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True))
    counts = [float(weights[a:b].sum()) for a, b in spans]
    counting = [i for i, count in enumerate(counts) if count > 0]
    means = [float((losses[a:b] * weights[a:b]).sum()) / counts[i] for i, (a, b) in enumerate(spans) if i in counting]
    found = reference(means, [counts[i] for i in counting], technique.strategy, 0.4)
    factors = [found[counting.index(i)] if i in counting else 0.0 for i in range(len(spans))]
    wide = model.double()
    h = torch.log_softmax(wide(batch), -1)[torch.arange(batch.num_tokens), batch.targets]
    each = torch.cat([torch.full((b - a,), f, dtype=torch.float64) for (a, b), f in zip(spans, factors, strict=True)])
    loss = -(h * weights * each).sum() / weights.sum()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in wide.parameters() if p.grad is not None))
    return float(loss.detach()), {n: p.grad for n, p in wide.named_parameters()}, [norm]  # type: ignore[misc]


@pytest.mark.parametrize("micro_rows", [ROWS, 3, 1])
def test_the_step_is_the_equation_over_the_whole_batch(micro_rows: int) -> None:
    """However it is cut into micro-batches; float32 sums in another order, 1e-5 of the largest entry."""
    technique = LossBased(temperature=0.4)
    report = same_step(stepped(trainer(technique, micro_rows)), technique, Rows().batch(0, ROWS))
    assert report.loss != report.extra["unweighted_loss"]
    assert 0.0 < report.extra["effective_tokens_frac"] < 1.0


def same_step(step: tuple[StepReport, dict[str, Tensor]], technique: LossBased, batch: Batch) -> StepReport:
    """The report of a step whose loss and gradient are those of `batch` by the equation."""
    (report, found), (loss, want, (norm,)) = step, whole_step(named("tied", "fp32"), technique, batch)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    for name, gradient in want.items():
        assert float((found[name] - gradient).abs().max()) <= 2e-5 * max(1.0, float(gradient.abs().max())), name
    return report


class Table(World):
    """A rank of two, whose peer's part is known."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs

    def gather(self, value: Any, *args: Any) -> list[Any]:
        self.mine = value
        return [value, self.theirs] if value[0] == 0 else [self.theirs, value]


def test_two_ranks_have_one_rank_s_factors_to_the_bit() -> None:
    model, technique = named("tied", "fp32"), LossBased(temperature=0.3)
    whole, _ = Reweigher(model, Causal(), technique, World(), Share())([Rows().batch(0, 8)], 0)
    tables: dict[int, Any] = {}
    micro = {share: [Rows().batch(2 * share, 2), Rows().batch(4 + 2 * share, 2)] for share in (0, 1)}
    for share in (0, 1):
        world = Table((1 - share, [([1.0], [1.0])] * 2))
        Reweigher(model, Causal(), technique, world, Share(index=share, count=2))(micro[share], 0)
        tables[share] = world.mine
    found = {
        share: Reweigher(model, Causal(), technique, Table(tables[1 - share]), Share(index=share, count=2))(micro[share], 0)[0]
        for share in (0, 1)
    }
    parts = [found[share][i].weights for i in (0, 1) for share in (0, 1)]
    assert torch.equal(torch.cat(parts), whole[0].weights)  # type: ignore[arg-type]


class Poisoned(Rows):
    def batch(self, first_row: int, num_rows: int) -> Batch:
        batch = super().batch(first_row, num_rows)
        if first_row <= 5 < first_row + num_rows:
            batch.weights[-1] = math.nan  # type: ignore[index]
        return batch


def test_a_loss_that_is_not_finite_is_the_step_s_to_report() -> None:
    run = trainer(LossBased(), 3, rows=Poisoned())
    before = frozen(run.model)
    with pytest.raises(NumericsError, match="The step was not taken"):
        run.step()
    assert difference(before, frozen(run.model)) is None


def test_it_composes_with_another_objective() -> None:
    """The factors are those of what the objective makes of a sequence, sentinels included, and so is the gradient."""
    technique, objective = LossBased(temperature=0.4), Ul2(first_special=280)
    prepared = objective.prepare(Low().batch(0, ROWS), stream_seed(0, "objective"))
    report = same_step(stepped(trainer(technique, 4, objective, rows=Low())), technique, prepared)
    assert abs(report.loss - report.extra["unweighted_loss"]) > 1e-3 * report.loss  # a hundred times what is forgiven above


def test_bits_per_byte_are_those_of_the_text() -> None:
    """Unweighted, since a sequence's bytes are counted once; none where what is learned is not all text."""

    def line(reweighting: LossBased | None, objective: Objective) -> dict[str, Any]:
        run = trainer(reweighting, 4, objective, rows=Low())
        return step_line(run.step(), run.position, run.model.config, 1e9)

    plain, found = line(None, Causal()), line(LossBased(temperature=0.4), Causal())
    assert plain["bits_per_byte"] == pytest.approx(plain["loss"] / math.log(2) / 3.0, rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-6)  # losses of another batch, float32
    assert abs(found["loss"] - plain["loss"]) > 1e-3 * plain["loss"]
    assert "bits_per_byte" not in line(None, Ul2(first_special=280))
    assert "bits_per_byte" not in line(LossBased(), Ul2(first_special=280))


class Low(Rows):
    """Tokens below 280, of three bytes each: the rest is free for special ids."""

    def batch(self, first_row: int, num_rows: int) -> Batch:
        batch = super().batch(first_row, num_rows)
        numbers = torch.repeat_interleave(first_row + torch.arange(num_rows), SEQ_LEN)
        extras = {"row": numbers, "bytes": 3.0 * (batch.weights > 0).double()}  # type: ignore[operator,union-attr]
        told = {"tokens": batch.tokens % 280, "targets": batch.targets % 280, "token_extras": extras}  # type: ignore[operator]
        return Batch(**{**vars(batch), **told})


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"temperature=0\.0 must be positive or null"):
        LossBased(temperature=0.0)
    with pytest.raises(ConfigError, match="after_tokens=-1 not negative"):
        LossBased(after_tokens=-1)
