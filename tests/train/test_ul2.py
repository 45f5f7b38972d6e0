"""UL2: what it makes of a sequence against T5's rules written out, rates and lengths, and what a run keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_cases import ROWS, SEQ_LEN, Rows, named
from train_cases import same_state

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.keep.reader import Checkpoint
from waypost.testing.frozen import difference, frozen
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.train.batch_sizes.fixed import Fixed
from waypost.train.memory import Plain
from waypost.train.metrics import read_lines
from waypost.train.objectives import Causal, Ul2
from waypost.train.objectives._spans import Draw, composition, random_spans, random_suffix
from waypost.train.objectives.ul2 import Denoiser
from waypost.train.optimizers import AdamW
from waypost.train.parallel import Single, World
from waypost.train.run import train
from waypost.train.schedules import Wsd
from waypost.train.trainer import Trainer

FIRST = 200
R, S, X = FIRST, FIRST + 1, FIRST + 2


def text(*lengths: int, row: int = 0) -> Batch:
    """Sequences of one row each, 10, 11, 12 ...; the last token's successor counts, every fifth token does not."""
    starts = [10 + 3 * i for i in range(len(lengths))]
    batch = Batch.of(
        [range(a, a + n) for a, n in zip(starts, lengths, strict=True)],
        targets=[range(a + 1, a + n + 1) for a, n in zip(starts, lengths, strict=True)],
        weights=[[0.0 if i % 5 == 3 else 1.0 for i in range(n)] for n in lengths],
    )
    rows = torch.repeat_interleave(row + torch.arange(len(lengths)), batch.starts.diff().long())
    extras = {"row": rows, "bytes": 2.0 * (batch.weights > 0).double()}  # type: ignore[operator]
    return Batch(**{**vars(batch), "token_extras": extras})


def one(mode: Any, span: float | None, rate: float, **changes: Any) -> Ul2:
    return Ul2(first_special=FIRST, denoisers=[Denoiser(mode=mode, span=span, rate=rate)], **changes)


def reference(tokens: list[int], successor: int, weights: list[float], mask: list[bool]) -> tuple[list[int], list[float]]:
    """T5's two sequences, one loop over the tokens each, end to end: (ids, weight of each id as a target)."""
    inputs: list[int] = []
    targets: list[tuple[int, float]] = []
    spans = 0
    for i, (token, hidden) in enumerate(zip(tokens, mask, strict=True)):
        if not hidden:
            inputs.append(token)
            continue
        if i == 0 or not mask[i - 1]:
            inputs.append(FIRST + 3 + spans)
            targets.append((FIRST + 3 + spans, targets[-1][1] if targets else 0.0))
            spans += 1
        targets.append((token, weights[i - 1]))
    targets.append((FIRST + 3 + spans, targets[-1][1]))
    return [*inputs, *(t for t, _ in targets)], [0.0] * len(inputs) + [w for _, w in targets]


@pytest.mark.parametrize(("span", "rate"), [(3.0, 0.15), (3.0, 0.5), (8.0, 0.5), (64.0, 0.5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_golden_spans(span: float, rate: float, seed: int) -> None:
    batch = text(40, row=seed)
    found = one("R", span, rate, mode_tokens=False).prepare(batch, seed)
    ids = [*found.tokens.tolist(), int(found.targets[-1])]  # type: ignore[index]
    opened = ids.index(FIRST + 3, ids.index(FIRST + 3) + 1)
    mask = [token not in ids[:opened] for token in batch.tokens.tolist()]
    want, weights = reference(batch.tokens.tolist(), 50, batch.weights.tolist(), mask)  # type: ignore[union-attr]
    assert ids == want
    assert found.targets.tolist() == want[1:]  # type: ignore[union-attr]
    assert found.weights.tolist() == weights[1:]  # type: ignore[union-attr]
    assert sum(mask) == round(40 * rate)
    assert sum(a and not b for a, b in zip([*mask, False][1:], mask, strict=True)) + mask[0] == max(1, round(sum(mask) / span))
    assert not mask[0]
    assert set(found.token_extras) == {"row"}  # sentinels count, and stand for no bytes


def test_golden_by_hand() -> None:
    """A suffix of all but one token after a mode token; the first token of a sequence never counts."""
    found = one("S", None, 0.5).prepare(text(4), 3)
    assert found.tokens.tolist() == [S, 10, 11, 12, 13]
    assert found.targets.tolist() == [10, 11, 12, 13, 14]  # type: ignore[union-attr]
    assert found.positions.tolist() == [0, 1, 2, 3, 4]
    assert found.starts.tolist() == [0, 5]
    assert found.weights.tolist() in ([0, 0, 0, 1, 0], [0, 0, 1, 1, 0], [0, 1, 1, 1, 0])  # type: ignore[union-attr]
    assert found.token_extras["bytes"].tolist() == [2 * weight for weight in found.weights.tolist()]  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 2**62), st.integers(0, 10**9))
def test_a_suffix_of_everything_without_mode_is_causal_to_the_bit(lengths: list[int], seed: int, row: int) -> None:
    batch = text(*lengths, row=row)
    assert difference(frozen(one("S", None, 1.0, mode_tokens=False).prepare(batch, seed)), frozen(batch)) is None


def test_its_neutral_loss_and_gradient_are_causal_s_to_the_bit() -> None:
    batch, found = text(9, 14), []
    for objective in (Causal(), one("S", None, 1.0, mode_tokens=False)):
        model = tiny_model()
        loss, _ = objective.loss(model, objective.prepare(batch, 1))
        loss.backward()
        found.append(frozen({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}))
    assert difference(*found) is None


@given(st.integers(1, 90), st.integers(0, 2**62), st.integers(0, 6))
def test_inputs_and_targets_give_the_text_back(length: int, seed: int, which: int) -> None:
    """Every sentinel of the inputs replaced by what follows it in the targets."""
    batch = text(length)
    denoiser = Ul2(first_special=FIRST).denoisers[which]
    found = Ul2(first_special=FIRST, denoisers=[denoiser]).prepare(batch, seed)
    ids = [*found.tokens.tolist(), int(found.targets[-1])]  # type: ignore[index]
    assert ids[0] == {"R": R, "S": S, "X": X}[denoiser.mode]
    if FIRST + 3 not in ids:
        assert ids[1:] == [*batch.tokens.tolist(), 10 + length]
        return
    opened = ids.index(FIRST + 3, ids.index(FIRST + 3) + 1)
    inputs, targets = ids[1:opened], ids[opened:]
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token >= FIRST:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    assert spans.popitem()[1] == []
    assert [t for token in inputs for t in (spans[token] if token >= FIRST else [token])] == batch.tokens.tolist()
    assert len(ids) == 2 + length + 2 * len(spans)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**62))
def test_compositions_add_up(total: int, parts: int, seed: int) -> None:
    parts = min(total, parts)
    found = composition(total, parts, Draw(seed))
    assert found.sum() == total
    assert len(found) == parts
    assert (found >= 1).all()


def test_rates_over_many_draws() -> None:
    """Of 1,500 sequences of 256 tokens: the share hidden is the mixture's, suffixes are uniform about a quarter (standard
    error 0.9 tokens), a span lies anywhere as often as elsewhere."""
    suffixes = [random_suffix(256, 0.25, Draw(seed)) for seed in range(1500)]
    assert abs(sum(suffixes) / 1500 - 64) < 4
    assert (min(suffixes), max(suffixes)) == (1, 127)
    covered = torch.zeros(256)
    for seed in range(1500):
        for first, length in zip(*(part.tolist() for part in random_spans(256, 0.15, 3.0, Draw(seed))), strict=True):
            covered[first : first + length] += 1
    assert float(covered.sum()) == 1500 * 38
    middle = covered[16:240] / 1500
    assert float((middle - middle.mean()).abs().max()) < 0.04  # four standard errors of a share of 0.15
    chosen = [int(Ul2(first_special=FIRST).prepare(text(3, row=row), 0).tokens[0]) for row in range(700)]
    assert abs(chosen.count(X) - 400) < 60  # four and a half standard errors
    assert abs(chosen.count(R) - 200) < 60
    assert abs(chosen.count(S) - 100) < 45


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="the data holds token 208, but ids from first_special=200 on must stand in no text"):
        one("R", 3, 0.5).prepare(text(199), 0)
    objective = Ul2(first_special=285, denoisers=[Denoiser(mode="X", span=1, rate=0.5)])
    with pytest.raises(ConfigError, match="ids up to 308, the model has a vocabulary of 288"):
        objective.loss(tiny_model(), objective.prepare(text(40), 0))
    suffix = Ul2(first_special=288, denoisers=[Denoiser(mode="S", rate=0.25)])
    for read in (suffix.loss, suffix.losses):
        with pytest.raises(ConfigError, match="ids up to 289, the model has a vocabulary of 288"):  # a mode is no target
            read(tiny_model(), suffix.prepare(text(40), 0))
    long = one("X", 1, 0.5)
    with pytest.raises(ConfigError, match="lengthen a sequence to 81 tokens, the model knows 64 positions"):
        long.loss(tiny_model(tiny_config(max_position_embeddings=64)), long.prepare(text(40), 0))
    with pytest.raises(ConfigError, match="denoisers name at least one"):
        Ul2(first_special=200, denoisers=[])
    with pytest.raises(ConfigError, match=r"rate=1\.5"):
        Denoiser(mode="S", rate=1.5)


def test_another_cut_into_micro_batches_trains_the_same() -> None:
    """A resumed run may change micro_tokens: what is corrupted stays, so the gradient does, to float32's rounding."""
    gradients = []
    for rows in (12, 3):
        model, seen = named("tied", "fp32"), {}
        run = Trainer(
            model=model, optimizer=AdamW(lr=1e-2).build(list(model.named_parameters())), stream=Numbered(), schedule=Wsd(),
            objective=Ul2(first_special=270), batch_size=Fixed(tokens=ROWS * SEQ_LEN), memory=Plain(), parallel=Single(),
            world=World(), micro_tokens=rows * SEQ_LEN,
        )  # fmt: skip
        run.before_state_mutation = lambda seen=seen, model=model: seen.update(
            {n: p.grad.clone() for n, p in model.named_parameters()}
        )
        run.step()
        gradients.append(seen)
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).abs().max()) <= 2e-5 * max(1.0, float(gradient.abs().max())), name


def test_killed_and_resumed_equals_never_stopped(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its third step, behind the backward passes: what was corrupted before and after is the same, to the bit."""
    special: dict[str, Any] = {
        "tokenizer": {"vocab_size": 320, "reserved": 40},
        "objective": {"name": "ul2", "first_special": 280},
    }
    tree = recipe(steps=4, save={"every_steps": 2}, micro_tokens=64, threads=1, **special)
    whole = train(tree, tmp_path / "whole")
    norm = Trainer._squared_norm

    def killed(self: Trainer) -> float:
        if self.position.step == 2:
            raise Killed
        return norm(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_squared_norm", killed)
        with pytest.raises(Killed):
            train(tree, tmp_path / "killed")
    assert Checkpoint(tmp_path / "killed").step == 2
    resumed = train(tree, tmp_path / "killed")
    same_state(whole.checkpoint, resumed.checkpoint)
    losses = [[line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")]
    assert losses[0] == losses[1]


class Killed(BaseException):
    """Not an Exception, as a kill is none: nobody handles it on the way."""


class Numbered(Rows):
    """Rows with their numbers, of ids below 270."""

    def batch(self, first_row: int, num_rows: int) -> Batch:
        batch = super().batch(first_row, num_rows)
        numbers = torch.repeat_interleave(first_row + torch.arange(num_rows), SEQ_LEN)
        told = {"tokens": batch.tokens % 270, "targets": batch.targets % 270, "token_extras": {"row": numbers}}  # type: ignore[operator]
        return Batch(**{**vars(batch), **told})
