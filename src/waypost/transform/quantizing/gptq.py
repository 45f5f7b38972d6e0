"""GPTQ: rounds a weight column by column, each column's error made good by the columns that are still to come.

Source    Frantar et al. 2022, GPTQ, arXiv:2210.17323, sec. 3, algorithm 1; static groups as in its authors' gptq.py
Equation  H = X^T X + damping mean(diag X^T X) I,  U^T U = H^-1;  column by column
          q_j = round(w_j / s),  e = (w_j - q_j s) / U_jj,  w_k -= e U_jk for k > j
Shapes    weight (N, K), rows X (T, K) -> q (N, K), s (N, K / G)      G = inputs of a group
Acts on   each output of one linear alone, its inputs in the order of their energy or as they stand
Differs   symmetric only; an input that the text never uses keeps its weight, rounded, where theirs becomes zero; in the order
          of inputs a group's scale comes from weights with all corrections, theirs miss those of the running block of columns.
          All linears of a layer are shown the rows that come out of the layers before, as theirs without `true-sequential`
Exact     with inputs that are orthogonal and equally large it is round to nearest, bit for bit
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.model.linear.scheme import Scheme
from waypost.transform.quantizing.round_to_nearest import nearest_codes, scales_of

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.kernels.linear.quantized import QuantizedWeight
    from waypost.transform.quantizing._contract import Observer

BLOCK_COLUMNS = 128
"""Columns whose corrections reach the later ones in one product; any number gives the same weights but for rounding."""


class SecondMoments:
    """Sum of x x^T over the rows x of a linear: (K, K) float64."""

    def __init__(self, inputs: int) -> None:
        import torch

        self.sum = torch.zeros(inputs, inputs, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        wide = x.float()
        self.sum += (wide.t() @ wide).double()


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """X^T X (K, K) float64 -> U (K, K) float64, upper triangular, with U^T U = (X^T X + damping mean(diag) I)^-1.

    NumericsError where X^T X is not finite, or so near to singular that rounding takes its inverse.
    """
    import torch

    if not bool(moments.isfinite().all()):
        raise NumericsError("what the linear is given on the calibration text is not finite; the source's weights are broken")
    diagonal = moments.diagonal()
    missing = torch.where(diagonal == 0, 1.0, 0.0)  # an input that is never used tells nothing of the others
    damped = moments + torch.diag(missing + damping * (diagonal + missing).mean())
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"X^T X over {len(moments)} inputs has no inverse with damping={damping}: the calibration text shows too few "
            "different rows; raise damping (0.01 is usual) or give a longer text"
        ) from error


def gptq(
    weight: Tensor, moments: Tensor, bits: int, group_size: int, damping: float, by_energy: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """weight (N, K) float32, X^T X (K, K) float64 -> q (N, K) int8, scale (N, K / G) bfloat16.

    `by_energy` takes the inputs with the largest sum of squares first, and scales from the weights as they were.
    """
    import torch

    scale = scales_of(weight.unflatten(1, (-1, group_size)), bits)
    order = torch.argsort(moments.diagonal(), descending=True, stable=True) if by_energy else torch.arange(weight.shape[1])
    upper = inverse_factor(moments[order][:, order], damping).float()
    left, q = weight[:, order], torch.zeros(weight.shape, dtype=torch.int8)
    for start, stop in _blocks(weight.shape[1], group_size):
        block, errors = left[:, start:stop].clone(), torch.zeros_like(left[:, start:stop])
        for i, column in enumerate(order[start:stop].tolist()):
            if not by_energy and column % group_size == 0:
                members = block[:, i : i + group_size] if group_size <= BLOCK_COLUMNS else left[:, start : start + group_size]
                scale[:, column // group_size] = scales_of(members, bits)
            step = scale[:, column // group_size].float()
            q[:, column] = codes = nearest_codes(block[:, i] / step, bits)
            errors[:, i] = (block[:, i] - codes.float() * step) / upper[start + i, start + i]
            block[:, i + 1 :] -= errors[:, i, None] * upper[start + i, start + i + 1 : stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return q, scale


def _blocks(inputs: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most BLOCK_COLUMNS columns that hold whole groups, or lie within one."""
    span = max(group_size, BLOCK_COLUMNS // group_size * group_size)
    for begin in range(0, inputs, span):
        end = min(begin + span, inputs)
        yield from ((at, min(at + BLOCK_COLUMNS, end)) for at in range(begin, end, BLOCK_COLUMNS))


@technique
class Gptq:
    bits: Literal[4, 8] = 4
    """Bits of a weight."""
    group_size: int | None = 32
    """Inputs that share a scale, G; null is a whole row."""
    damping: float = 0.01
    """Share of the mean diagonal of X^T X that is added to it: the more, the less it trusts the text. Above 0."""
    order: Literal["energy", "inputs"] = "energy"
    """energy: inputs with the largest sum of squares first, where an error is still made good by most; inputs: as stored."""

    def __post_init__(self) -> None:
        if not self.damping > 0.0:
            raise ConfigError(f"Gptq.damping={self.damping}: must be above 0, or a short text leaves nothing to divide by")
        self.scheme()

    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size)

    def observe(self, inputs: int) -> Observer | None:
        return SecondMoments(inputs)

    def quantize(self, weight: Tensor, seen: Observer | None) -> QuantizedWeight:
        from waypost.kernels.linear.quantized import QuantizedWeight

        assert isinstance(seen, SecondMoments), seen
        group = self.scheme().group_of(weight.shape[1])
        q, scale = gptq(weight, seen.sum, self.bits, group, self.damping, self.order == "energy")
        return QuantizedWeight.of(q, scale, self.bits)
