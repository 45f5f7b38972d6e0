"""Weights packed ahead of PyTorch: the panels of any other packing, and nothing left where nobody takes them."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from waypost.kernels import build, memory
from waypost.kernels.linear import packing
from waypost.kernels.linear.cpu import pack
from waypost.kernels.linear.packing import PANEL, Lying

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler here and no library from a wheel; naive is used")

PRODUCTS = [[(96, 64), (48, 64), (50, 64)], [(7, 34)], [(48, 2)], [(200, 66), (48, 66)]]
FITTING = [0, 1, 2]
"""Of PRODUCTS. Of the last, a panel would hold the end of one weight and the beginning of the next."""


@pytest.fixture
def room() -> Iterator[None]:
    pack(torch.zeros(48, 2, dtype=torch.bfloat16))  # the kernels are there
    memory.reserve(1 << 21).join(60)
    yield
    packing.settle()


def weights(product: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).bfloat16() for shape in product]


def lying(product: list[Tensor]) -> packing.Product:
    return tuple(Lying(w.data_ptr(), *w.shape) for w in product)


class Never(Executor):
    """A thread that is too late."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]
        return Future()


def test_panels_are_those_of_weights_packed_later(room: None) -> None:
    products = [weights(product, seed) for seed, product in enumerate(PRODUCTS)]
    with ThreadPoolExecutor(1) as thread:
        packing.begin(thread, [lying(product) for product in products], products)
    assert len(packing._begun) == len(FITTING)
    for number, product in enumerate(products):
        early = packing.take(product)
        assert (early is not None) == (number in FITTING)
        later = pack(*product)
        if early is not None:
            assert early.dtype == torch.bfloat16
            assert torch.equal(early, later.panels)
            assert packing.take(product) is None, "once: who packs again has changed them"
        assert (later.outputs, later.inputs) == (sum(map(len, product)), product[0].shape[1])
    assert not packing._begun


def test_packing_uses_what_was_begun(room: None) -> None:
    product = weights(PRODUCTS[0])
    with ThreadPoolExecutor(1) as thread:
        packing.begin(thread, [lying(product)], product)
    address = packing._begun[lying(product)].claim.address
    assert pack(*product).panels.data_ptr() == address
    assert pack(*product).panels.data_ptr() != address
    assert not pack(*weights(PRODUCTS[0], 1)).panels.equal(pack(*product).panels)


def test_only_rows_that_lie_one_after_the_other_are_those(room: None) -> None:
    square = weights([(48, 48)])
    with ThreadPoolExecutor(1) as thread:
        packing.begin(thread, [lying(square)], square)
    assert packing.take([square[0].t()]) is None
    assert packing.take(square) is not None


def test_addresses_are_held_as_long_as_panels_wait(room: None) -> None:
    product = weights(PRODUCTS[0])
    begun, gone = lying(product), weakref.ref(product[0])
    with ThreadPoolExecutor(1) as thread:
        packing.begin(thread, [begun], product)
    del product
    assert gone() is not None, "or another weight could come to lie there"
    packing.settle()
    assert gone() is None


def test_what_nobody_began_is_packed_by_who_needs_it(room: None) -> None:
    product = weights(PRODUCTS[0])
    packing.begin(Never(), [lying(product)], product)
    assert packing.take(product) is None
    assert not packing._begun


def test_a_failed_head_start_is_no_error(room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    product = weights(PRODUCTS[0])

    def missing(group: str, element: str) -> None:
        raise OSError("the library went away")

    with ThreadPoolExecutor(1) as thread, monkeypatch.context() as patch:
        patch.setattr(build, "library", missing)
        packing.begin(thread, [lying(product)], product)
    assert packing.take(product) is None


def test_nothing_is_begun_without_kernels_or_room(room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    large = weights([(48 * 400, 64)])
    with ThreadPoolExecutor(1) as thread:
        packing.begin(thread, [lying(large)], large)
        with monkeypatch.context() as patch:
            patch.setattr(build, "built", lambda group, element: False)
            packing.begin(thread, [lying(weights([(7, 34)]))], None)
        memory.settle()
        packing.begin(thread, [lying(small := weights([(7, 34)]))], small)
    assert not packing._begun


def test_only_what_was_reserved_is_claimed(room: None) -> None:
    memory.settle()
    memory.empty((64,), torch.uint8)  # a slab for everybody
    assert memory.claim(64) is None
    memory.reserve(4096)
    first, second = memory.claim(100), memory.claim(64)
    assert first is not None
    assert second is not None
    assert (first.num_bytes, second.address - first.address) == (128, 128)
    assert first.part(64, 64).address == first.address + 64
    assert memory.claim(1 << 20) is None


def test_what_is_left_goes_back_to_the_system(room: None) -> None:
    product = weights([(48 * 40, 64)])
    with ThreadPoolExecutor(1) as thread:
        packing.begin(thread, [lying(product)], product)
    claim = packing._begun[lying(product)].claim
    assert bool(claim.tensor().any())
    packing.settle()
    assert not packing._begun
    inner = claim.tensor()[4096:-4096]  # pages that it shares with others stay
    assert not bool(inner.any()), "fresh pages are zero"


def test_shapes_of_panels() -> None:
    assert packing.shape([(96, 64), (49, 64)]) == (4, 32, PANEL, 2)
    assert packing.shape([(1, 3)]) == (1, 2, PANEL, 2)
    assert not packing.fits([(48, 3)])
    assert packing.fits([(48, 4), (5, 4)])
    assert not packing.fits([(48, 4), (48, 6)]), "of a damaged folder"


def test_packing_does_not_wait_for_an_import_of_pytorch() -> None:
    """The import is held until the library is there; one that waited for it would never be."""
    code = """
import sys, threading
from importlib.machinery import PathFinder, SourceFileLoader

class Held(SourceFileLoader):
    def exec_module(self, module):
        half_way.set()
        assert loaded.wait(60), "the library waits for PyTorch"
        super().exec_module(module)

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "torch.version" else None
        if spec is not None:
            spec.loader = Held(name, spec.origin)
        return spec

half_way, loaded = threading.Event(), threading.Event()
sys.meta_path.insert(0, Finder)
importing = threading.Thread(target=__import__, args=("torch",))
importing.start()
assert half_way.wait(60)
from waypost.kernels import build
build.library("pass", "bf16")
loaded.set()
importing.join()
print(sys.modules["torch"].ones(2).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2.0\n", "")


def test_libraries_share_pytorch_s_threads_though_they_came_first() -> None:
    code = """
import sys
from waypost.kernels import build
build.library("pass", "bf16")
assert "torch" not in sys.modules
import torch
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(len(runtimes))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
