"""LAMB and Muon against their equations in float64, against PyTorch's, and over shards against one rank."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_worker import CASES, steps, trainer
from parallel_cases import ROWS, SEQ_LEN, write_state
from torch import Tensor, nn
from train_cases import same_state, tiny_recipe, write_corpus, write_tokenizer

from waypost.core.errors import ConfigError
from waypost.keep.reader import Checkpoint
from waypost.model import hf
from waypost.serve.engine import Engine
from waypost.serve.sampling import Sampling
from waypost.train.batch_sizes import AdAdaGrad
from waypost.train.optimizers import AdamW, Lamb, Muon
from waypost.train.optimizers.muon import orthogonalised
from waypost.train.parallel import World
from waypost.train.run import train

SHAPES = {"embed_tokens.weight": (9, 4), "tall.weight": (7, 3), "wide.weight": (3, 5), "norm.weight": (5,)}


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(n, nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for n, s in SHAPES.items()]


def gradients(step: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def walk(spec: Any, scale: float = 1.0, clip: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    named = parameters(dtype)
    optimizer = spec.build(named)
    for step in range(4):
        for name, parameter in named:
            parameter.grad = gradients(step, scale)[name].to(dtype)
        optimizer.step(gradient_scale=clip)
    return {name: p.detach() for name, p in named}


def norm(values: list[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in values))


def test_lamb_equals_the_equation_in_float64() -> None:
    lr, b1, b2, eps, decay, top = 0.02, 0.8, 0.9, 1e-4, 0.3, 3.0
    got = walk(Lamb(lr=lr, beta1=b1, beta2=b2, eps=eps, weight_decay=decay, max_norm=top), clip=0.5)
    for name, parameter in parameters():
        x = parameter.detach().double().flatten().tolist()
        m, v = [0.0] * len(x), [0.0] * len(x)
        matrix = parameter.dim() == 2
        for k in range(1, 5):
            g = (0.5 * gradients(k - 1)[name]).double().flatten().tolist()
            m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
            v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g, strict=True)]
            u = [a / (1 - b1**k) / (math.sqrt(b / (1 - b2**k)) + eps) for a, b in zip(m, v, strict=True)]
            u = [a + decay * b * matrix for a, b in zip(u, x, strict=True)]
            ratio = min(norm(x), top) / norm(u) if matrix else 1.0
            x = [a - lr * ratio * b for a, b in zip(x, u, strict=True)]
        want = torch.tensor(x, dtype=torch.float64).view(got[name].shape)
        torch.testing.assert_close(got[name].double(), want, rtol=2e-6, atol=2e-6)  # a few roundings of 2^-24


ADAM = st.fixed_dictionaries(
    {"lr": st.floats(0, 0.1), "beta1": st.floats(0, 0.95), "beta2": st.floats(0, 0.999), "eps": st.floats(1e-8, 1e-2),
     "weight_decay": st.floats(0, 0.5)}
)  # fmt: skip


@given(ADAM, st.floats(0.1, 2))
@settings(max_examples=20, deadline=None)
def test_lamb_without_its_ratio_is_adamw(fields: dict[str, float], clip: float) -> None:
    ours, want = walk(Lamb(adapt=False, **fields), clip=clip), walk(AdamW(**fields), clip=clip)
    for name, value in want.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-6, atol=1e-6)  # another order of the same operations


@given(ADAM, st.floats(0.01, 0.5), st.floats(0.1, 20), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_lamb_moves_a_matrix_by_a_share_of_its_norm(fields: dict[str, float], lr: float, top: float, scale: float) -> None:
    """Whatever the gradient and the moments: |step| = lr min(|x|, max_norm), measured on a difference of float32 numbers."""
    named = parameters()
    optimizer = Lamb(**{**fields, "lr": lr}, max_norm=top).build(named)
    for step in range(2):
        before = {name: parameter.detach().clone() for name, parameter in named}
        for name, parameter in named:
            parameter.grad = gradients(step, scale)[name]
        optimizer.step()
        for name, parameter in named:
            if parameter.dim() == 2:
                moved, size = float((parameter.detach() - before[name]).norm()), float(before[name].norm())
                assert moved == pytest.approx(lr * min(size, top), rel=1e-3), name


@given(ADAM, st.floats(0.1, 2))
@settings(max_examples=20, deadline=None)
def test_muon_of_no_matrix_is_adamw_to_the_bit(fields: dict[str, float], clip: float) -> None:
    ours, want = walk(Muon(adamw=["*"], rest=AdamW(**fields)), clip=clip), walk(AdamW(**fields), clip=clip)
    assert all(torch.equal(ours[name], value) for name, value in want.items())


@given(st.floats(1e-2, 1e4))
@settings(max_examples=20, deadline=None)
def test_steps_do_not_depend_on_the_scale_of_the_gradient(scale: float) -> None:
    """To rounding; LAMB's eps and AdamW's, which embeddings and vectors take under Muon, are small beside any gradient."""
    for spec in (Lamb(eps=1e-12), Muon(rest=AdamW(eps=1e-12))):
        one, other = walk(spec), walk(spec, scale=scale)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


def test_a_matrix_of_zeros_moves_by_the_ratio_one() -> None:
    w = nn.Parameter(torch.zeros(2, 3))
    w.grad = torch.ones(2, 3)
    Lamb(lr=0.1).build([("w", w)]).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 3), -0.1), rtol=1e-4, atol=0.0)


def newton_schulz(u: list[list[float]], steps: int) -> list[list[float]]:
    """The equation, entry by entry."""
    if len(u) > len(u[0]):
        return transposed(newton_schulz(transposed(u), steps))
    size = norm([v for row in u for v in row]) + 1e-8
    x = [[v / size for v in row] for row in u]
    for _ in range(steps):
        gram = product(x, transposed(x))
        square = product(gram, gram)
        poly = [[-4.7750 * a + 2.0315 * b for a, b in zip(r, s, strict=True)] for r, s in zip(gram, square, strict=True)]
        x = [[3.4445 * a + b for a, b in zip(r, s, strict=True)] for r, s in zip(x, product(poly, x), strict=True)]
    return x


def transposed(x: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*x, strict=True)]


def product(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[math.fsum(p * q for p, q in zip(row, column, strict=True)) for column in transposed(b)] for row in a]


def test_muon_equals_the_equation_in_float64() -> None:
    lr, beta, decay, rms = 0.05, 0.9, 0.2, 0.3
    spec = Muon(lr=lr, momentum=beta, weight_decay=decay, update_rms=rms)
    got = walk(spec, clip=0.5)
    for name, parameter in parameters():
        if name in ("embed_tokens.weight", "norm.weight"):
            continue
        x = parameter.detach().double().tolist()
        b = [[0.0] * len(row) for row in x]
        scale = rms * math.sqrt(max(parameter.shape))
        for step in range(4):
            g = (0.5 * gradients(step)[name]).double().tolist()
            b = [[beta * p + q for p, q in zip(r, s, strict=True)] for r, s in zip(b, g, strict=True)]
            u = [[q + beta * p for p, q in zip(r, s, strict=True)] for r, s in zip(b, g, strict=True)]
            o = newton_schulz(u, 5)
            x = [[p - lr * (scale * q + decay * p) for p, q in zip(r, s, strict=True)] for r, s in zip(x, o, strict=True)]
        want = torch.tensor(x, dtype=torch.float64)
        # the iteration magnifies a rounding of a small singular value by up to 3.4^5
        torch.testing.assert_close(got[name].double(), want, rtol=1e-4, atol=1e-5)
    rest = walk(spec.rest, clip=0.5)
    for name in ("embed_tokens.weight", "norm.weight"):
        assert torch.equal(got[name], rest[name]), "AdamW to the bit"


def test_muon_is_near_pytorchs() -> None:
    """torch.optim.Muon iterates in bfloat16, so updates agree to some roundings of 2^-8 that five iterations magnify."""
    named = [(n, p) for n, p in parameters() if n in ("tall.weight", "wide.weight")]
    theirs = torch.optim.Muon([p for _, p in named], lr=0.05, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for name, parameter in named:
            parameter.grad = gradients(step)[name]
        theirs.step()
    ours, before = walk(Muon(lr=0.05, weight_decay=0.2, momentum=0.9)), dict(parameters())
    for name, parameter in named:
        moved, off = parameter.detach() - before[name].detach(), ours[name] - parameter.detach()
        assert float(off.norm()) < 0.03 * float(moved.norm()), name


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_singular_values_come_to_about_one(rows: int, columns: int, seed: int) -> None:
    u = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    left, before, right = torch.linalg.svd((u / u.norm()).double(), full_matrices=False)
    after = (left.t() @ orthogonalised(u, 5).double() @ right.t()).diagonal()[before > 0.01]
    assert float(after.min()) > 0.675
    assert float(after.max()) < 1.14
    torch.testing.assert_close(orthogonalised(u.t(), 5), orthogonalised(u, 5).t(), rtol=0, atol=1e-3)  # sums in another order


def test_who_takes_what_and_bad_fields() -> None:
    roles = {(e.spec.name, e.spec.role) for e in Muon().build(parameters(torch.bfloat16)).entries()}
    adam = {(n, r) for n in ("embed_tokens.weight", "norm.weight") for r in ("exp_avg", "exp_avg_sq", "master")}
    assert roles == adam | {(n, r) for n in ("tall.weight", "wide.weight") for r in ("momentum", "master")}
    chosen = {e.spec.name for e in Muon(adamw=["wide*"]).build(parameters()).entries() if e.spec.role == "momentum"}
    assert chosen == {"tall.weight"}
    for call, words in (
        (lambda: Muon(adamw=["wid"]).build(parameters()), "Muon.adamw: 'wid' matches no parameter"),
        (lambda: Lamb(no_adapt=["wid"]).build(parameters()), "Lamb.no_adapt: 'wid' matches no parameter"),
        (lambda: Muon(momentum=1.0), "momentum=1.0"),
        (lambda: Muon(newton_schulz_steps=-1), "newton_schulz_steps=-1"),
        (lambda: Muon(lr=-1.0), "lr=-1.0"),
        (lambda: Lamb(beta2=1.0), "beta2=1.0"),
        (lambda: Lamb(eps=0.0), "eps=0.0"),
        (lambda: Lamb(max_norm=0.0), "max_norm=0.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


@pytest.mark.parametrize("spec", [Lamb(lr=0.1), Muon(lr=0.1)])
def test_masters_are_float32(spec: Any) -> None:
    wide, half = walk(spec), walk(spec, dtype=torch.bfloat16)
    for name, value in wide.items():
        assert half[name].dtype == torch.bfloat16
        torch.testing.assert_close(half[name].float(), value, rtol=0.05, atol=0.05)  # bfloat16 begins elsewhere


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for optimizer in ("lamb", "muon"):
        for model in ("tied", "mixture"):
            write_state(steps(trainer(optimizer, model, "single", World())), folder / f"{optimizer}-{model}-single")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("optimizer_worker.py")), str(folder)], capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("optimizer", "model", "layout"), CASES)
def test_over_shards_it_is_one_ranks(optimizer: str, model: str, layout: str, sharded: Path) -> None:
    """Equal gradients: Muon's momentum is equal to the bit, and its gathered matrix is the whole one. Adam's moments are, but
    for the tail of a vector loop, which rounds otherwise and lies elsewhere in a shard. LAMB's norms over ranks are float64
    sums in another order. So a step is one rank's to some roundings of 2^-24."""
    one, other = (Checkpoint(sharded / name) for name in (f"{optimizer}-{model}-single", f"{optimizer}-{layout}"))
    assert one.specs == other.specs
    for role, name in one.specs:
        want, got = one.tensor(name, role), other.tensor(name, role)
        if role == "momentum":
            assert torch.equal(got, want), name
        else:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_the_variance_of_the_gradient_is_one_ranks(layout: str, sharded: Path) -> None:
    run = trainer("lamb", "tied", "single", World(), batch=AdAdaGrad(tokens=ROWS * SEQ_LEN))
    run.step()
    said = json.loads((sharded / "said.json").read_text())
    assert said[layout] == pytest.approx(run.stats, rel=1e-4)
    assert "needs micro-batches added in float32" in said["bf16"]


def test_the_outlier_safe_set_is_trained_resumed_and_served(tmp_path: Path) -> None:
    """Fields of a recipe alone; what is served has the trainer's bits (tests/serve/test_matrix.py has every situation)."""
    recipe = tiny_recipe(write_corpus(tmp_path), write_tokenizer(tmp_path), optimizer={"name": "muon"}, steps=4)
    recipe["model"] |= {"norm_gain": "scalar", "embedding_projection": True}
    train(recipe, tmp_path / "whole")
    train({**recipe, "steps": 2}, tmp_path / "cut")
    train(recipe, tmp_path / "cut")
    same_state(tmp_path / "whole", tmp_path / "cut")
    checkpoint = Checkpoint(tmp_path / "whole")
    assert checkpoint.config["model_type"] == "waypost"
    assert {name for role, name in checkpoint.specs if role == "momentum"} >= {
        "model.embed_projection.weight", "model.norm.projection.weight"
    }  # fmt: skip
    prompt = [5, 9, 14, 3]
    engine = Engine(tmp_path / "whole", num_pages=8)
    (answer,) = engine.generate([prompt], Sampling(temperature=0.0, max_tokens=1, ignore_eos=True))
    assert answer.choices[0].token_ids == [int(hf.logits(hf.load(tmp_path / "whole"), prompt)[-1].argmax())]
