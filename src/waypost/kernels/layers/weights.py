"""What layers.cpp is told: the weights of all layers and what is around them, as Python has them and as the kernel reads them.

Shapes: C hidden_size, H query heads, G key/value heads, D head width, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_double, c_int, c_int32, c_long, c_void_p, cast
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from waypost.kernels.call import kernels, page_stride
from waypost.kernels.greedy.cpu import Screen
from waypost.kernels.linear.compact import FEW_ROWS, Compact
from waypost.kernels.linear.cpu import Packed
from waypost.kernels.linear.quantized import QuantizedPanels
from waypost.kernels.low_rank.factors import Factors
from waypost.kernels.ops import Pages

KINDS = ("norms", "products", "attention", "head")
"""What a pass consists of, in the order in which its clock counts: norms with the residual sums; the products with weights,
gated activations among them; attention with rotary positions and the way of keys and values to their pages; the product
with the vocabulary, where a call goes that far."""


@dataclass(frozen=True)
class Product:
    """x W^T + b over a packed weight; one in few bits takes rows in bfloat16."""

    weight: Packed | QuantizedPanels
    bias: Tensor | None
    compact: Compact | None = None
    """The weight a second time, for few rows."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer: x + attention(norm(x)), then x + ffn(norm(x)). Vectors are in the dtype of the hidden states."""

    attention_norm: Tensor
    """(C,)"""
    ffn_norm: Tensor
    """(C,)"""
    q_norm: Tensor | None
    """(D,): RMSNorm of each query head before it is rotated; None: none."""
    k_norm: Tensor | None
    qkv: Product
    """C -> (H + 2 G) D"""
    out: Product
    """H D -> C"""
    gate_up: Product
    """C -> 2 F"""
    down: Product
    """F -> C"""
    heads: int
    groups: int
    width: int
    window: int | None
    scale: float
    eps: float


PRODUCTS = ("qkv", "out", "gate_up", "down")
"""The products of a layer, in the order of the kernel."""

SITES = ("q", "k", "v", "out", "gate", "up", "down")
"""The projections of a layer that adapters change, in the order of the kernel."""


class LayerAdapters:
    """What adapters add to all layers as the kernel reads it; `factors` are kept alive with it."""

    def __init__(self, factors: Sequence[Sequence[Factors | None]]) -> None:
        """The SITES of every layer, each with an entry for every adapter; None: it changes nothing there."""
        self.factors = factors
        self.count = len(factors[0])
        pointers = [None if each is None else each.pointer for site in factors for each in site]
        self.rows = (c_void_p * len(pointers))(*pointers)


class _Product(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("panels", "scales", "bias")),
        *((name, c_long) for name in ("pairs", "outputs", "group_pairs")),
        ("bits", c_int),
        *((name, c_void_p) for name in ("share", "compact")),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        *((name, _Product) for name in PRODUCTS),
        *((name, c_int) for name in ("heads", "groups", "width", "window")),
        *((name, c_double) for name in ("scale", "eps")),
    ]


class EndsRow(Structure):
    """Ends of given.h: what is around the layers, and what is asked for."""

    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "embedding", "norm")),
        ("eps", c_double),
        ("head", _Product),
        ("wanted", c_void_p),
        ("answers", c_long),
        *((name, c_void_p) for name in ("normed", "logits", "greedy", "screen", "peaks", "places")),
    ]


class StepRow(Structure):
    """Step of given.h: the pages, the rows and their adapters."""

    _fields_ = [
        *((name, c_void_p) for name in ("table", "starts", "context", "slots", "cosine", "sine")),
        ("page_stride", c_long),
        *((name, c_int) for name in ("table_width", "sequences")),
        *((name, c_void_p) for name in ("seconds", "which", "factors")),
        ("adapters", c_long),
        ("share_low_rank", c_void_p),
    ]


class LayerTable:
    """The weights of all layers as the kernel reads them; `weights` are kept alive with it."""

    def __init__(self, weights: Sequence[LayerWeights]) -> None:
        self.weights = list(weights)
        self.seconds: Tensor | None = None
        """(len(KINDS),) float64: each pass adds the seconds that its kinds of work took. None: nothing is timed."""
        self.rows = (_Layer * len(self.weights))(*map(_layer, self.weights))
        self.every = (c_int32 * len(self.weights))(*range(len(self.weights)))
        """All of them, in their order."""
        self._compact: dict[int, Compact] = {}
        self._places: tuple[Sequence[Tensor], Sequence[Tensor], Any, Any, int] | None = None

    @property
    def products(self) -> list[Product]:
        """PRODUCTS of every layer, one layer behind the other."""
        return [getattr(weights, name) for weights in self.weights for name in PRODUCTS]

    def compact(self, product: int, codes: Compact) -> None:
        """From now on passes of few rows read `codes` instead of the weight of that one of `products`."""
        self._compact[product] = codes
        layer, which = divmod(product, len(PRODUCTS))
        getattr(self.rows[layer], PRODUCTS[which]).compact = codes.address

    def weight_bytes(self, rows: int) -> int:
        """Bytes of weights that a pass of so many rows reads in the layers."""
        few = self._compact if rows <= FEW_ROWS else {}
        plain = [product.weight for i, product in enumerate(self.products) if i not in few]
        scales = sum(weight.scales.nbytes for weight in plain if isinstance(weight, QuantizedPanels))
        return scales + sum(weight.panels.nbytes for weight in plain) + sum(codes.num_bytes for codes in few.values())

    def places(self, pages: Pages) -> tuple[Any, Any, int]:
        """Where the keys and the values of each layer lie, and how many elements from a page to the next. A cache keeps its
        tensors, so they are looked up once."""
        known = self._places
        if known is None or known[0] is not pages.k_pages or known[1] is not pages.v_pages:
            k, v = ((c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)) for tensors in (pages.k_pages, pages.v_pages))
            self._places = known = pages.k_pages, pages.v_pages, k, v, page_stride(*pages.k_pages, *pages.v_pages)
        return known[2:]


@dataclass(frozen=True)
class ModelEnds:
    """What is around the layers. V vocab_size."""

    embedding: Tensor
    """(V, C), in the dtype of the hidden states."""
    norm: Tensor
    """(C,)"""
    eps: float
    head: Product
    """C -> V"""
    screen: Screen | None = None
    """Of the head, for who asks for the likeliest token alone."""


def _layer(weights: LayerWeights) -> _Layer:
    norms = (weights.attention_norm, weights.ffn_norm, weights.q_norm, weights.k_norm)
    products = (getattr(weights, name) for name in PRODUCTS)
    return _Layer(
        *map(pointer, norms), *map(product_row, products), weights.heads, weights.groups, weights.width, weights.window or 0,
        weights.scale, weights.eps,
    )  # fmt: skip


def product_row(product: Product) -> _Product:
    """`product` as the kernel reads it."""
    weight, bias = product.weight, pointer(product.bias)
    panels, pairs = weight.panels.data_ptr(), -(-weight.inputs // 2)
    if isinstance(weight, Packed):
        few = None if product.compact is None else product.compact.address
        return _Product(panels, None, bias, pairs, weight.outputs, pairs, 16, None, few)
    share = cast(kernels(weight.scales).share_quantized, c_void_p)
    scales, group_pairs = weight.scales.data_ptr(), weight.group_size // 2
    return _Product(panels, scales, bias, pairs, weight.outputs, group_pairs, weight.bits, share)


def pointer(vector: Tensor | None) -> int | None:
    """Where a vector lies; None for none."""
    return None if vector is None else vector.data_ptr()
