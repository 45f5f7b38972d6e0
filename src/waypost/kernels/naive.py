"""The specification of every operator, as one set."""

from __future__ import annotations

from waypost.kernels.attention.naive import counting_attention, paged_attention, ragged_attention, write_pages
from waypost.kernels.cross_entropy.naive import cross_entropy_gradient, log_sum_exp
from waypost.kernels.draw.naive import draw
from waypost.kernels.largest.naive import largest
from waypost.kernels.linear.naive import linear
from waypost.kernels.low_rank.naive import low_rank
from waypost.kernels.ops import Ops
from waypost.kernels.rms_norm.naive import rms_norm
from waypost.kernels.rope.naive import rope
from waypost.kernels.squared_norm.naive import squared_norm
from waypost.kernels.swiglu.naive import swiglu
from waypost.kernels.vocabulary import WHOLE


def ops() -> Ops:
    """The set in plain PyTorch: the slow twin of all others, and what runs where there is no compiler."""
    return Ops(
        "naive",
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
    )
