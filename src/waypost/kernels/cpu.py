"""The compiled set: C++ for all but products of float32 weights, which are PyTorch's on padded rows."""

from __future__ import annotations

from waypost.kernels import build
from waypost.kernels.attention.cpu import counting_attention, paged_attention, ragged_attention, write_pages
from waypost.kernels.cross_entropy.cpu import cross_entropy_gradient, log_sum_exp
from waypost.kernels.draw.cpu import draw
from waypost.kernels.largest.cpu import largest
from waypost.kernels.layers.cpu import run_greedy, run_layers, run_model
from waypost.kernels.layers.ops import AtOnceOps
from waypost.kernels.layers.passes import run_passes
from waypost.kernels.linear.cpu import linear
from waypost.kernels.low_rank.cpu import low_rank
from waypost.kernels.ops import Ops
from waypost.kernels.rms_norm.cpu import rms_norm
from waypost.kernels.rope.cpu import rope
from waypost.kernels.squared_norm.cpu import squared_norm
from waypost.kernels.swiglu.cpu import swiglu
from waypost.kernels.vocabulary import WHOLE


def ops() -> Ops:
    """The compiled set; what is not compiled yet is when it is first used. ConfigError without a compiler."""
    build.require()
    return Ops(
        "cpu",
        linear,
        rms_norm,
        rope,
        swiglu,
        write_pages,
        paged_attention,
        counting_attention,
        ragged_attention,
        log_sum_exp,
        largest,
        draw,
        cross_entropy_gradient,
        squared_norm,
        WHOLE,
        low_rank,
        AtOnceOps(run_layers, run_model, run_greedy, run_passes),
    )
