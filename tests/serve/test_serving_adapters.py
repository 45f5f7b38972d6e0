"""Many adapters in one batch: a request's bits are those of the trainer's forward pass with its adapter, whoever is beside."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import KERNELS, Answered, answers_of, by_hand, make_engine, model_of, poison

from waypost.core.errors import CapacityError, CheckpointError, ConfigError
from waypost.kernels.low_rank.factors import LANES
from waypost.model.adapter_names import is_adapter
from waypost.model.adapter_sites import sites
from waypost.model.adapters import Lora
from waypost.model.decoder import Decoder
from waypost.model.peft import LoraFile, read, write
from waypost.serve.adapter_places import first_fit
from waypost.serve.engine import Engine
from waypost.serve.loading import prepare_for_serving
from waypost.serve.request import Completion, Request
from waypost.serve.sampling import Sampling
from waypost.testing.points._shared import noise

SPECS = {
    "one": Lora(r=1, alpha=4.0),
    "four": Lora(r=4, alpha=9.0, target_modules=["q_proj", "down_proj"]),
    "seven": Lora(r=7, alpha=5.0, rslora=True),
}
PROMPT = [5, 9, 40, 41, 42, 43, 99, 7, 8, 100, 101, 102, 12, 14, 77, 78, 79, 3, 30]
SAMPLING = Sampling(max_tokens=6, temperature=0.8, seed=3, logprobs=0, ignore_eos=True)


def adapted(model: Decoder, name: str) -> Decoder:
    """The trainer's model with the adapter `name`, whose numbers are drawn by their names."""
    spec, found = SPECS[name], copy.deepcopy(model)
    spec.apply(found)
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            if is_adapter(key):
                parameter.copy_(0.2 * noise(*parameter.shape, name=f"{name}/{key}"))
    return found


def saved(model: Decoder, name: str, folder: Path) -> Path:
    pairs = {}
    for site, module in adapted(model, name).named_modules():
        if hasattr(module, "adapter"):
            pairs[site] = (module.adapter.lora_A.weight.detach(), module.adapter.lora_B.weight.detach())
    return write(folder / name, LoraFile(folder, pairs, {}, SPECS[name].file_config("base")))


def run(engine: Engine, *requests: Request) -> list[Completion]:
    """All at once; engine invariants are checked after every step."""
    ready = [engine.prepare(request) for request in requests]
    done = {r.id: r.completion() for r in ready}
    for each in ready:
        engine.submit(each)
    while not engine.idle:
        for delta in engine.step():
            assert delta.error is None, delta.error
            done[delta.request_id].add(delta)
        engine.scheduler.check()
    return list(done.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_engines_of_one_model_have_adapters_of_the_same_name(kernel: str, tmp_path: Path) -> None:
    model = model_of("gqa", "bf16", kernel)
    paths = [saved(model, name, tmp_path) for name in ("one", "seven")]
    first, second, both = (prepare_for_serving(copy.deepcopy(model)) for _ in range(3))
    answers = []
    for models in ((first, second), (both, both)):
        engines = [make_engine(each) for each in models]
        for engine, path in zip(engines, paths, strict=True):
            engine.adapters.add("the same", path)
        answers.append([answers_of(run(each, Request(PROMPT, SAMPLING, adapter="the same"))[0]) for each in engines])
    assert answers[0][0] != answers[0][1]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["gqa", "one-kv-head-wide", "post-norm"])
def test_all_together_are_the_trainer_one_by_one(variant: str, dtype: str, kernel: str, tmp_path: Path) -> None:
    model = model_of(variant, dtype, kernel)
    engine = make_engine(copy.deepcopy(model), num_pages=400, max_batch_tokens=24)
    for name in SPECS:
        engine.adapters.add(name, saved(model, name, tmp_path))
    names = [None, "one", "seven", "four", "seven", None]
    got = run(engine, *(Request(PROMPT[: 19 - i], SAMPLING, adapter=n) for i, n in enumerate(names)))
    texts = set()
    for i, (name, completion) in enumerate(zip(names, got, strict=True)):
        prompt = PROMPT[: 19 - i]
        want = by_hand(model if name is None else adapted(model, name), prompt, SAMPLING)
        assert completion.token_ids == want[0]
        assert completion.choices[0].logprobs == want[1], f"request {i} with {name}: other bits than the trainer's"
        texts.add(tuple(completion.choices[0].logprobs))
    assert len(texts) == len(names), "an adapter, or a prompt, changed nothing"


@functools.cache
def answer_of(name: str | None, length: int) -> Answered:
    model = model_of("gqa", "bf16", KERNELS[-1])
    return by_hand(model if name is None else adapted(model, name), PROMPT[:length], SAMPLING)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, *SPECS]), st.integers(14, 19)), min_size=1, max_size=8), st.integers(1, 64)
)  # fmt: skip
def test_in_any_company_it_is_the_trainer_s(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[str | None, int]], budget: int
) -> None:
    """Who has no adapter has the base's bits."""
    model = model_of("gqa", "bf16", KERNELS[-1])
    engine = make_engine(copy.deepcopy(model), num_pages=400, max_batch_tokens=budget)
    folder = tmp_path_factory.mktemp("company")
    for name in SPECS:
        engine.adapters.add(name, saved(model, name, folder))
    got = run(engine, *(Request(PROMPT[:length], SAMPLING, adapter=name) for name, length in wanted))
    assert [answers_of(completion) for completion in got] == [[answer_of(*each)] for each in wanted]


@settings(max_examples=6, deadline=None)
@given(
    st.builds(Lora, r=st.integers(1, 24), alpha=st.floats(0.1, 64), rslora=st.booleans()),
    st.sampled_from([[], ["one"], ["seven", "four"]]), st.integers(1, 64),
)  # fmt: skip
def test_an_adapter_that_adds_nothing_has_the_base_s_bits(
    tmp_path_factory: pytest.TempPathFactory, spec: Lora, beside: list[str], budget: int
) -> None:
    """The neutral setting, B = 0: how training begins."""
    model, folder = model_of("gqa", "bf16", KERNELS[-1]), tmp_path_factory.mktemp("nothing")
    shapes = {site: linear.weight.shape for site, linear in sites(model).items()}
    pairs = {site: (noise(spec.r, s[1], name=site), torch.zeros(s[0], spec.r)) for site, s in shapes.items()}
    engine = make_engine(copy.deepcopy(model), num_pages=400, max_batch_tokens=budget)
    engine.adapters.add("zero", write(folder / "zero", LoraFile(folder, pairs, {}, spec.file_config("base"))))
    for name in beside:
        engine.adapters.add(name, saved(model, name, folder))
    names = ["zero", *beside, "zero"]
    got = run(engine, *(Request(PROMPT, SAMPLING, adapter=name) for name in names))
    assert answers_of(got[0]) == answers_of(got[-1]) == [answer_of(None, len(PROMPT))]


@pytest.mark.parametrize("kernel", KERNELS)
def test_served_on_packed_weights_and_swapped_weights(kernel: str, tmp_path: Path) -> None:
    from waypost.keep.lineage import Lineage
    from waypost.keep.writer import save
    from waypost.model import hf

    model = model_of("gqa", "bf16", kernel)
    folder = save(
        tmp_path / "m", entries=hf.entries(model), config=hf.config_to_hf(model.config), lineage=Lineage(verb="t", recipe={})
    )
    with Engine(folder, kernel=kernel, num_pages=200) as engine:  # type: ignore[arg-type]
        poison(engine)
        engine.adapters.add("seven", saved(model, "seven", tmp_path))
        for _ in range(2):
            (a, b) = run(engine, Request(PROMPT, SAMPLING, adapter="seven"), Request(PROMPT, SAMPLING))
            assert a.choices[0].logprobs == by_hand(adapted(model, "seven"), PROMPT, SAMPLING)[1]
            assert b.choices[0].logprobs == by_hand(model, PROMPT, SAMPLING)[1]
            engine.swap(folder)


def test_prefixes_belong_to_their_adapter(tmp_path: Path) -> None:
    model = model_of("gqa", "fp32")
    engine = make_engine(model, num_pages=200)
    engine.adapters.add("one", saved(model, "one", tmp_path))
    first, plain, again = (run(engine, Request(PROMPT, SAMPLING, adapter=name))[0] for name in ("one", None, "one"))
    assert (first.cached_tokens, plain.cached_tokens, again.cached_tokens) == (0, 0, 16)
    assert first.choices[0].logprobs == again.choices[0].logprobs != plain.choices[0].logprobs
    engine.adapters.remove("one")
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        engine.prepare(Request(PROMPT, adapter="one"))
    saved(model, "seven", tmp_path)
    engine.adapters.add("one", tmp_path / "seven")  # the name is used again, for other weights
    other = run(engine, Request(PROMPT, SAMPLING, adapter="one"))[0]
    assert other.cached_tokens == 0
    assert other.choices[0].logprobs == by_hand(adapted(model, "seven"), PROMPT, SAMPLING)[1]


def test_an_adapter_is_removed_while_it_answers(tmp_path: Path) -> None:
    model = model_of("gqa", "fp32")
    engine = make_engine(model, num_pages=60)
    engine.adapters.add("one", saved(model, "one", tmp_path))
    ready = engine.prepare(Request(PROMPT, SAMPLING, adapter="one"))
    completion = ready.completion()
    engine.submit(ready)
    engine.adapters.remove("one")
    while not engine.idle:
        for delta in engine.step():
            completion.add(delta)
    assert completion.choices[0].logprobs == by_hand(adapted(model, "one"), PROMPT, SAMPLING)[1]


@pytest.mark.parametrize("kernel", KERNELS)
def test_adapters_and_keys_take_each_others_pages(kernel: str, tmp_path: Path) -> None:
    """A cache with room for one of the larger adapters at a time, and little more: evicted, preempted, and the same bits."""
    model = model_of("gqa", "fp32", kernel)
    sizes = make_engine(model, num_pages=200)
    for name in SPECS:
        sizes.adapters.add(name, saved(model, name, tmp_path))
    pages = {name: sizes.adapters.find(name).num_pages for name in SPECS}
    engine = make_engine(model, num_pages=max(pages.values()) + 4, max_sequences=4)
    for name in SPECS:
        engine.adapters.add(name, tmp_path / name)
    names = ["one", "seven", "four", "seven", None, "one"]
    got = run(engine, *(Request(PROMPT, SAMPLING, adapter=name) for name in names))
    for name, completion in zip(names, got, strict=True):
        want = by_hand(model if name is None else adapted(model, name), PROMPT, SAMPLING)
        assert completion.choices[0].logprobs == want[1], name
    long = engine.prepare(Request(PROMPT, Sampling(max_tokens=100), adapter="one"))  # pushes the adapters out
    engine.submit(long)
    while not engine.idle:
        engine.step()
        engine.scheduler.check()
    with pytest.raises(CapacityError, match="beside the adapter 'seven'"):
        engine.prepare(Request(PROMPT, Sampling(max_tokens=100), adapter="seven"))
    small = make_engine(model, num_pages=max(pages.values()))
    with pytest.raises(CapacityError, match="raise num_pages"):
        small.adapters.add("seven", tmp_path / "seven")


@given(st.lists(st.integers(1, 96), max_size=40))
@settings(max_examples=60, deadline=None)
def test_segments_do_not_overlap(lengths: list[int]) -> None:
    places, halves = first_fit(lengths, 96)
    taken: set[tuple[int, int]] = set()
    for (half, offset), length in zip(places, lengths, strict=True):
        mine = {(half, offset + i) for i in range(length)}
        assert offset % LANES == 0
        assert offset + length <= 96
        assert half < halves
        assert not taken & mine
        taken |= mine


def test_what_belongs_to_another_model_is_refused(tmp_path: Path) -> None:
    other = saved(model_of("one-kv-head-wide", "fp32"), "one", tmp_path)
    engine = make_engine(model_of("gqa", "fp32"))
    with pytest.raises(ConfigError, match="belongs to another"):
        engine.adapters.add("x", other)
    with pytest.raises(ConfigError, match="an expert"):
        make_engine(model_of("moe", "fp32")).adapters.add("x", saved(model_of("gqa", "fp32"), "one", tmp_path))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        engine.adapters.add("x", tmp_path / "nowhere")
    good = saved(model_of("gqa", "fp32"), "one", tmp_path / "good")
    engine.adapters.add("x", good)
    with pytest.raises(ConfigError, match="already"):
        engine.adapters.add("x", good)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora"),
        ("peft_type", "IA3", "only LORA"),
        ("bias", "all", "bias"),
        ("alpha_pattern", {"q_proj": 3}, "alpha_pattern"),
    ],
)
def test_what_changes_the_function_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    file = read(saved(model_of("gqa", "fp32"), "one", tmp_path))
    write(tmp_path / "x", LoraFile(tmp_path, file.pairs, {}, {**file.config, field: value}))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "x")
