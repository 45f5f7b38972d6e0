"""What a memory technique says that it holds, and of what: bytes alone, so that a run can be planned before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from waypost.model.config import LayerSpec


@dataclass(frozen=True)
class Sizes:
    """A layer's bytes a token under plain autograd; `item` is the width of a number of the compute dtype."""

    item: int
    hidden: float
    """One row of hidden states."""
    pairs: float
    """Keys and values."""
    kept: float
    """All that waits for the backward pass, the layer's input among it and its output not."""
    cheap: float
    """Of `kept`, outputs of operators that have a `recompute`."""
    passing: float
    """Gradients that are there beside it while the layer is differentiated, at the most."""

    @property
    def wide_item(self) -> int:
        """Bytes of a number that chunks add up in: float32, or the compute dtype where that is wider."""
        return max(4, self.item)

    @property
    def wide_pairs(self) -> float:
        """Keys and values, or sums of their gradients, in the dtype that chunks add up in."""
        return self.pairs / self.item * self.wide_item


@dataclass(frozen=True)
class Held:
    """Bytes of tensors that a technique holds of one layer for one micro-batch; weights and their gradients left out."""

    kept: float
    """From the layer's forward pass to its backward pass."""
    at_work: float
    """While the layer is differentiated, `kept` included."""
    head_rows: int
    """Rows whose logits are there at once, at the most."""
    summed: bool = False
    """Whether the gradients of the layer's weights are added up over chunks, in the dtype that those add up in."""
    together: bool = False
    """Whether all layers run forward again before the first is differentiated, so that all have at work what they have."""


def sizes(layer: LayerSpec, hidden_size: int, item: int) -> Sizes:
    """Of one layer: its mixer's and its feed-forward's, and two norms with their inputs and outputs, a float32 a row each."""
    parts = layer.mixer.keeps(hidden_size) + layer.ffn.keeps(hidden_size)
    # a norm behind its part gives its output to a sum, which keeps nothing; what the parts read is there instead
    cheap = parts.cheap + (2 * hidden_size if layer.norm == "pre" else 0)
    kept = (4 * hidden_size + parts.narrow) * item + (2 + parts.wide) * max(4, item)
    return Sizes(item, hidden_size * item, parts.pairs * item, kept, cheap * item, parts.passing * item)
