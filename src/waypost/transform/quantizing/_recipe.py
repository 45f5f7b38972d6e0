"""The recipe of a quantised folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from waypost.core.config import Table, build, override, read_yaml, recipe
from waypost.core.errors import ConfigError
from waypost.transform.quantizing import METHODS
from waypost.transform.recipe import HeldOut


@recipe
class QuantizeRecipe:
    """What `waypost transform` runs where a recipe has a `quantizer`."""

    source: str
    """A checkpoint, a Hugging Face folder or a run (its latest checkpoint), with full weights."""
    quantizer: Annotated[Any, Table("quantizer", METHODS)]
    """How the linears of the layers are stored."""
    head: Annotated[Any, Table("quantizer", METHODS)] = None
    """How the output head is stored; null keeps it. Of a small model the head is most of what a token reads."""
    keep: list[str] | None = None
    """Names of linears that stay as they are, with * for any letters; null keeps those that choose experts."""
    calibration: HeldOut = HeldOut()
    """Text for quantisers that look at what linears are given."""
    held_out: HeldOut = HeldOut()
    """Text on which both losses are measured, with both models in memory; null measures them on the probe alone."""
    verify: bool = True
    """Measure the output against the source; false says so in the manifest."""
    probe_tokens: int = 512
    """Tokens of the shipped probe text on which they are compared; it has about 200."""

    def __post_init__(self) -> None:
        asking = [name for name in ("quantizer", "head") if (q := getattr(self, name)) is not None and q.observe(2) is not None]
        if asking and self.calibration.path is None:
            raise ConfigError(
                f"{asking[0]}: {type(getattr(self, asking[0])).__name__} looks at what linears are given; set calibration.path "
                "to a text (waypost transform quantize: --calibration TEXT)"
            )


def resolve(given: QuantizeRecipe | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> QuantizeRecipe:
    """The recipe behind a file, a mapping or a recipe."""
    if isinstance(given, QuantizeRecipe):
        return given
    tree = dict(given) if isinstance(given, Mapping) else read_yaml(given)
    return build(QuantizeRecipe, override(tree, overrides))
