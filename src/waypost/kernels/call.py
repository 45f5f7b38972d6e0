"""How Python hands tensors to the compiled kernels: functions by element type, pointers, the thread count."""

from __future__ import annotations

from ctypes import c_double, c_float, c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels.build import improved, library

WIDE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
"""The dtype in which each element type is computed."""

_P, _I, _L, _D = c_void_p, c_int, c_long, c_double
SIGNATURES: dict[str, dict[str, list[Any]]] = {
    "pass": {
        "attention_forward": [_P, _L, _P, _P, _L, _P, _I, _P, _P, _I, _I, _I, _I, _D, _I, _P, _P, _I],
        "write_pages": [_P, _L, _P, _L, _P, _P, _L, _P, _I, _I, _I],
        "run_layers": [_P, _I, _P, _I, _P, _P, _P, _P, _P, _L, _L, _I],
        "run_passes": [_P, _I, _P, _P, _P, _P, _P, _P, _P, _L, _I],
        "linear": [_P, _L, _L, _P, _L, _P, _I],
        "linear_plain": [_P, _L, _L, _P, _L, _P, _I],
        "pack_panels": [_P, _L, _L, _P, _I],
        "rms_norm_forward": [_P, _P, _L, _I, _D, _P, _P, _I],
    },
    "elementwise": {
        "rope": [_P, _L, _P, _P, _I, _I, _I, c_float, _P, _I],
        "swiglu_forward": [_P, _L, _P, _L, _L, _I, _P, _I],
        "swiglu_backward": [_P, _L, _P, _L, _P, _L, _I, _P, _P, _I],
    },
    "logits": {
        "draw": [_P, _P, _P, _P, _P, _L, _L, _I],
        "largest": [_P, _L, _L, _L, _P, _P, _I],
        "log_sum_exp": [_P, _L, _L, _I, _P, _I],
        "cross_entropy_gradient": [_P, _L, _I, _P, _P, _P, _I],
    },
    "training": {
        "attention_backward": [_P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _D, _I, _P, _P, _P, _I],
        "rms_norm_backward": [_P, _P, _P, _P, _L, _I, _P, _P, _I],
        "squared_norm": [_P, _L, _I],
    },
    "quantized": {
        "linear_quantized": [_I, _P, _L, _L, _P, _P, _L, _L, _P, _I],
        "share_quantized": [_P, _I, _P, _L, _L, _P, _P, _L, _L, _P],
        "pack_quantized": [_I, _P, _L, _L, _L, _L, _P, _I],
    },
    "compact": {
        "compact_pays": [],
        "linear_compact": [_P, _P, _L, _P, _I],
        "pack_compact": [_P, _L, _L, _P, _P, _P, _L, _I],
        "share_compact": [_P, _P, _P, _L, _P, _P],
    },
    "int8": {"linear_int8": [_P, _P, _P, _P, _P, _L, _L, _P, _P, _P, _L, _P, _I]},
    "greedy": {
        "greedy": [_P, _L, _P, _P, _P, _I],
        "greedy_pays": [],
        "pack_screen": [_P, _L, _L, _P, _P, _P, _P, _P, _P, _I],
    },
    "low_rank": {
        "low_rank": [_P, _L, _L, _P, _L, _L, _P, _L, _P, _I],
        "share_low_rank": [_P, _P, _L, _L, _P, _L, _P, _I, _P, _L, _P, _L],
    },
    "counting": {"count_attention": [_P, _L, _P, _L, _P, _P, _I, _P, _P, _I, _I, _I, _I, _D, _I, _P, _I]},
}
"""What each of compiling.GROUPS exports: names and argument types."""

RETURNS: dict[str, Any] = {
    "squared_norm": c_double, "greedy": c_long, "greedy_pays": c_int, "run_layers": c_long, "run_passes": c_long,
    "compact_pays": c_int, "pack_compact": c_long,
}  # fmt: skip

_GROUP_OF = {name: group for group, functions in SIGNATURES.items() for name in functions}


class Kernels:
    """The compiled functions for one element type, by name; a group of them is built and loaded on its first use."""

    def __init__(self, element: str) -> None:
        self.element = element

    def __getattr__(self, name: str) -> Any:  # only for names that are not set yet
        group = _GROUP_OF.get(name)
        if group is None:
            raise AttributeError(f"no compiled kernel '{name}'")
        loaded = library(group, self.element)
        function = getattr(loaded, f"waypost_{name}_{self.element}")
        function.argtypes, function.restype = SIGNATURES[group][name], RETURNS.get(name)
        setattr(self, name, function)
        if library(group, self.element) is not loaded:  # a faster one came in between
            self.renew(group)
        return function

    def renew(self, group: str) -> None:
        """Asks for the functions of `group` anew when they are next used. Any thread may call it."""
        for name in SIGNATURES[group]:
            self.__dict__.pop(name, None)


_KERNELS = {torch.float32: Kernels("float"), torch.bfloat16: Kernels("bf16"), torch.float64: Kernels("double")}


def _renew(group: str, element: str) -> None:
    for each in _KERNELS.values():
        if each.element == element:
            each.renew(group)


improved.append(_renew)


def kernels(x: Tensor) -> Kernels:
    """The compiled kernels for the elements of `x`: float32, bfloat16 or float64 on the CPU; anything else is a ShapeError."""
    found = _KERNELS.get(x.dtype)
    if found is None or x.device.type != "cpu":
        raise ShapeError(
            f"the compiled CPU kernels take float32, bfloat16 and float64 on the CPU, given {x.dtype} on {x.device}"
        )
    return found


def page_stride(*tensors: Tensor) -> int:
    """Elements from a page to the next of the cache's `tensors` (pages, G, ...), equal for all of them; else a ShapeError."""
    strides = {x.stride(0) for x in tensors}
    if len(strides) > 1 or any(not x[:1].is_contiguous() for x in tensors):
        found = "; ".join(f"{tuple(x.shape)} in strides {x.stride()}" for x in tensors)
        raise ShapeError(f"pages of keys and values lie equally far apart, and each is contiguous; given are {found}")
    return strides.pop()


def rows_of(x: Tensor) -> Tensor:
    """`x` with everything but the first dimension contiguous, copied only if need be; its row stride is x.stride(0)."""
    expected = 1
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if stride != expected and size != 1:
            return x.contiguous()
        expected *= size
    return x
