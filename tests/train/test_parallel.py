"""Tensor and expert parallel against one rank: gradients, states, bytes, bits; four processes play all the worlds."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_cases import DTYPES, MODELS, PUSH, ROWS, Rows, load_state, named, trainer, write_gradient, write_state
from parallel_worker import GRADIENTS, STATES, choices, file_name
from train_cases import same_state

from waypost.core.batch import Batch
from waypost.core.errors import ConfigError
from waypost.core.state import local_box
from waypost.keep.reader import Checkpoint
from waypost.kernels import select
from waypost.measure.traffic import Traffic
from waypost.model.decoder import Decoder
from waypost.model.ffn.moe import MoeFfn
from waypost.model.rows import Rows as Pass
from waypost.testing.tiny import tiny_config, tiny_model
from waypost.train.memory import Plain
from waypost.train.objectives import Causal
from waypost.train.parallel import Expert, Share, Tensor, World
from waypost.train.parallel._collectives import enter
from waypost.train.parallel._dispatch import LocalExperts, bounds
from waypost.train.parallel.tensor import message_bytes, split_model

CASES = [(world, case) for world, cases in GRADIENTS.items() for case in cases]
SIZES = {"a": 2, "b": 4, "c": 3, "d": 2}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    first = trainer("mixture", "bf16", "single")
    first.step()
    write_state(first, folder / "state-single")
    script, environment = Path(__file__).with_name("parallel_worker.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script)]
    logs = [folder / f"log-{rank}" for rank in range(4)]
    with ExitStack() as stack:
        members = []
        for rank, log in enumerate(logs):
            out = stack.enter_context(log.open("w"))
            members.append(subprocess.Popen([*command, str(rank), str(folder)], stdout=out, stderr=out, env=environment))
            stack.callback(members[-1].wait)
            stack.callback(members[-1].kill)
        codes = [member.wait(timeout=400) for member in members]
    assert codes == [0] * 4, "\n".join(log.read_text()[-3000:] for log in logs)
    return folder


def found(folder: Path, world: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{world}.json").read_text()))


@functools.cache
def alone(model: str, precision: str, rows: int, pushed: bool, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """(report, gradient) of one rank that computes all rows in the same micro-batches."""
    run = trainer(model, precision, "single", rows=rows, balancing=PUSH if pushed else None)
    out = folder / file_name("alone", model, precision, str(rows), str(pushed))
    run.before_state_mutation = lambda: write_gradient(run, out)
    report = run.step()
    return report, gradient(out)


def gradient(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {name: checkpoint.tensor(name).double() for name in checkpoint.names}


@pytest.mark.parametrize(("world", "case"), CASES, ids=lambda text: text.replace(" ", "-"))
def test_loss_and_gradient_are_those_of_one_rank(world: str, case: str, worlds: Path) -> None:
    """Float32: sums over ranks in another order, some roundings of 2^-24 that four layers of products magnify; 1e-5 of each
    parameter's norm. Bfloat16 rounds each rank's part of a sum before it is added: 2^-9 a sum, and the whole gradient is as
    far from one rank's (2e-2) as that is from float32's (2e-2 to 5e-2); experts are whole, and only sums over rows differ.
    """
    model, precision, layout, *pushed = case.split()
    report, want = alone(model, precision, ROWS if world == "c" else 4, bool(pushed), worlds)
    said, got = found(worlds, world)["gradients"][case], gradient(worlds / file_name("gradient", world, case))
    assert got.keys() == want.keys()
    assert said["weight"] == report.weight
    exact = precision == "fp32"
    assert said["loss"] == pytest.approx(report.loss, rel=1e-6 if exact else 1e-3)
    assert said["grad_norm"] == pytest.approx(report.grad_norm, rel=1e-5 if exact else 1e-2)
    if exact or layout.startswith("expert"):
        for name, value in report.extra.items():
            assert said[name] == pytest.approx(value, rel=1e-5 if exact else 1e-2), name
    off = {name: float((got[name] - want[name]).square().sum()) for name in want}
    if exact:
        for name, square in off.items():
            assert square**0.5 <= 1e-5 * float(want[name].norm()), name
    size = sum(float(g.square().sum()) for g in want.values())
    bound = 1e-5 if exact else 1e-2 if layout.startswith("expert") else 3e-2
    assert sum(off.values()) <= bound**2 * size


def test_the_balancing_loss_is_in_those_gradients(worlds: Path) -> None:
    plain, pushed = (alone("mixture", "fp32", 4, flag, worlds)[1] for flag in (False, True))
    moved = {n for n in plain if float((plain[n] - pushed[n]).norm()) > 1e-3 * float(plain[n].norm())}
    assert "model.layers.0.mlp.gate.weight" in moved
    assert len(moved) > 10


def test_every_layout_loads_the_state_of_every_other(worlds: Path) -> None:
    """The processes compared what they loaded to the bit; here one rank loads what each of them wrote, and writes it."""
    written = [(w, layout) for w in "abc" for layout in STATES[w]]
    states = {w: found(worlds, w)["states"] for w in "abcd"}
    assert [states[w]["loaded"] for w in "abcd"] == [3 * 1, 5 * 4, 2 * 9, 3 * 7]
    assert [states[w]["resumed"] for w in "abc"] == [3, 5, 2], "resumed in the same layout, to the bit"
    for world, layout in written:
        source = worlds / file_name("state", world, layout)
        run = trainer("mixture", "bf16", "single", seed=5)
        load_state(run, source)
        write_state(run, worlds / file_name("again", world, layout))
        same_state(source, worlds / file_name("again", world, layout))
        assert run.position.step == 2


def test_bytes_of_tensor_parallel_are_the_formula_s(worlds: Path) -> None:
    for world, case in (("a", "tied tensor"), ("a", "biased tensor"), ("a", "mixture tensor"), ("b", "tied tensor/2")):
        for rank in found(worlds, world)["traffic"]:
            config = named(case.split()[0], "bf16").config
            want = message_bytes(config, rank[case]["rows"], rank[case]["learned"], 2)
            assert rank[case]["all_reduce"] == want
            assert "all_to_all" not in rank[case]


def test_the_formula_of_the_header(worlds: Path) -> None:
    """A dense model without norms of heads: s ((4 L + 1) T C + n C) + 12 n."""
    rank = found(worlds, "a")["traffic"][0]["biased tensor"]
    rows, learned = rank["rows"], rank["learned"]
    assert rank["all_reduce"] == 2 * ((4 * 2 + 1) * rows * 32 + learned * 32) + 12 * learned


def test_bytes_of_expert_parallel_are_the_formula_s(worlds: Path) -> None:
    """4 s C A' of rows and 8 E (R - 1) of counts a layer, A' counted in one process that routes all rows."""
    seen, _ = choices(named("mixture", "bf16"), Rows().batch(0, 4))
    limits = torch.tensor(bounds(6, 2)[1:-1])
    away = 0
    for choice in seen:
        owner = torch.bucketize(choice, limits, right=True)
        home = torch.arange(len(choice))[:, None] // (len(choice) // 2)
        away += int((owner != home).sum())
    ranks = [rank["mixture expert"] for rank in found(worlds, "a")["traffic"]]
    assert sum(rank["all_to_all"] for rank in ranks) == 4 * 2 * 32 * away + len(seen) * 8 * 6 * (2 - 1)


def test_experts_elsewhere_change_no_bit_of_a_forward_pass(worlds: Path) -> None:
    assert found(worlds, "b")["forward"] is True
    assert found(worlds, "c")["forward"] is True


def test_a_split_vocabulary_gives_whole_logits(worlds: Path) -> None:
    """Float32, values up to about ten."""
    assert found(worlds, "a")["logits"] <= 1e-5


@pytest.mark.parametrize("layout", ["fsdp", "tensor", "expert"])
@pytest.mark.parametrize("memory", ["stream_bp", "seco"])
def test_chunks_give_plain_s_gradient_under_every_placement(memory: str, layout: str, worlds: Path) -> None:
    """Though ranks have other numbers of tokens, hence of chunks; and gradients are reduced as often as plain's are."""
    told = found(worlds, "a")["chunked"]
    case, plain = told[f"{layout} {memory}"], told[f"{layout} plain"]
    assert case["off"] <= 1e-5
    assert case["weight"] == plain["weight"]
    assert case["reduced"] == plain["reduced"] == (0 if layout == "tensor" else 3)
    pieces = [[-(-tokens // 9) for tokens in rank] for rank in case["tokens"]]
    assert layout == "tensor" or pieces[0] != pieces[1]


def test_chunks_of_a_layer_that_is_gathered_in_parts_are_refused(worlds: Path) -> None:
    assert all("choose memory: recompute, or parallel.ranks: null" in said for said in found(worlds, "b")["refused"])


class Four(World):
    """A world of four ranks of which this is the second, as far as configuration goes."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.rank = 4, 1


@pytest.mark.parametrize(
    ("technique", "config", "says"),
    [
        (Tensor(), {"num_key_value_heads": 2}, r"2 key/value heads \(num_key_value_heads\) do not divide among 4 ranks"),
        (Tensor(), {"num_key_value_heads": 4, "vocab_size": 289}, r"289 rows of the vocabulary \(vocab_size\)"),
        (Tensor(), {"num_key_value_heads": 4, "intermediate_size": 66}, r"66 channels of the feed-forward"),
        (Tensor(ranks=3), {}, r"parallel\.ranks=3: 4 rank\(s\) were started, so it must be one of 1, 2, 4"),
        (Tensor(ranks=2), {"model_type": "olmo2"}, r"qk_norm: full\), which no rank holds"),
        (Expert(), {}, r"no layer of this model is a mixture of experts; choose fsdp or tensor"),
        (Expert(ranks=0), {}, r"parallel\.ranks=0"),
        (
            Expert(),
            {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
            r"3 experts for 4 ranks leave some without one; give parallel\.ranks at most 3",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused(technique: Any, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        technique.apply(tiny_model(tiny_config(**config)), Four())


def test_rows_are_shared_out_among_the_ranks_that_do_not_share_a_model() -> None:
    assert Tensor().share(Four()) == Share(0, 1, speaks=False)
    assert Tensor(ranks=2).share(Four()) == Share(0, 2, speaks=False)
    assert Tensor(ranks=1).share(Four()) == Share(1, 4)
    assert Expert(ranks=2).share(Four()) == Share(1, 4, meets=True)
    assert Expert(ranks=1).share(Four()) == Share(1, 4)


@contextmanager
def one_rank() -> Iterator[Any]:
    """A process group of this process alone: the machinery of several ranks, with nobody to talk to."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_that_travel_to_nobody_keep_their_bits(rows: int, chosen: int, seed: int, dtype: torch.dtype) -> None:
    """Forward; the gradient of h adds up the same two or three terms in another order."""
    config = tiny_config(model_type="mixtral", num_local_experts=5, num_experts_per_tok=chosen)
    mixture = tiny_model(config, seed=seed, dtype=dtype).model.layers[0].mlp
    assert isinstance(mixture, MoeFfn)
    h = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    batch = Pass(Batch.of([[1] * rows]), select(kernel="naive"))
    with one_rank() as group, torch.no_grad():
        want = mixture(h, batch)
        mixture.mix = LocalExperts(mixture.experts, group).__call__  # type: ignore[method-assign]
        assert torch.equal(mixture(h, batch), want)


SPLIT = {**MODELS, "biases": {"attention_bias": True, "mlp_bias": True}, "one": MODELS["biased"] | {"num_hidden_layers": 1}}


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(list(SPLIT)), st.integers(0, 1000), st.integers(1, 4))
def test_matrices_in_one_part_are_whole(name: str, seed: int, rows: int) -> None:
    """The neutral setting: loss and gradients through the operators of a split model are one rank's."""

    def biased() -> Decoder:
        made = tiny_model(tiny_config(**SPLIT[name]), seed=seed, kernel="auto")
        with torch.no_grad():
            for parameter in (p for n, p in made.named_parameters() if n.endswith("bias")):
                parameter.copy_(torch.linspace(-0.5, 0.5, len(parameter)))
        return made

    batch, model, other = Rows().batch(seed, rows), biased(), biased()
    with one_rank():
        split_model(other, World().mesh(tensor=1))
        losses = [Plain().forward_backward(m, batch, Causal(), 3.0)["loss"] for m in (model, other)]
        parts = [local_box(parameter.grad)[0] for parameter in other.parameters() if parameter.grad is not None]
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)  # max and sum over ranks come after the kernel's own
    for one, two in zip(model.parameters(), parts, strict=True):
        assert one.grad is not None
        assert float((one.grad - two).norm()) <= 1e-5 * float(one.grad.norm())


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(list(SPLIT)), st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=3),
    st.sampled_from(["fp32", "bf16"]),
)  # fmt: skip
def test_bytes_of_any_batch_are_the_formula_s(name: str, learned: list[list[bool]], precision: str) -> None:
    """What a rank hands to collectives does not depend on how many ranks there are: one tells it."""
    config, dtype = tiny_config(**SPLIT[name]), DTYPES[precision]
    model = tiny_model(config, dtype=dtype, kernel="auto")
    texts, weights = [[3 + i for i in range(len(f))] for f in learned], [[float(flag) for flag in f] for f in learned]
    batch = Batch.of(texts, targets=texts, weights=weights)
    with one_rank():
        split_model(model, World().mesh(tensor=1))
        with Traffic() as counted:
            Plain().forward_backward(model, batch, Causal(), 1.0)
    assert counted.bytes["all_reduce"] == message_bytes(config, batch.num_tokens, sum(map(sum, learned)), dtype.itemsize)


@given(st.integers(1, 64), st.data())
def test_every_row_is_computed_by_one_group_of_ranks_and_one_of_them_speaks(size: int, data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    shares = []
    for rank in range(size):
        world = World()
        world.size, world.rank = size, rank
        shares.append(Tensor(ranks=ranks).share(world))
    assert {share.count for share in shares} == {size // ranks}
    assert sorted(share.index for share in shares) == sorted([*range(size // ranks)] * ranks)
    assert sorted(share.index for share in shares if share.speaks) == [*range(size // ranks)]
    assert not any(share.meets for share in shares)


def test_what_enters_split_work_enters_once_and_is_freed() -> None:
    with one_rank() as group:
        h = torch.ones(2, 3, requires_grad=True) * 2
        entered = enter(h, group)
        assert enter(h, group) is entered
        assert entered.data_ptr() == h.data_ptr()
        seen = weakref.ref(h)
        del h, entered
        assert seen() is None


@given(st.integers(1, 200), st.integers(1, 16))
def test_experts_are_spread_evenly(experts: int, ranks: int) -> None:
    found = bounds(experts, ranks)
    sizes = [b - a for a, b in itertools.pairwise(found)]
    assert sum(sizes) == experts
    assert max(sizes) - min(sizes) <= 1
