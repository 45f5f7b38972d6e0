"""Claim: LLM.int8() against weights alone rounded to 8 bits, with one scale an output in both.

The paper claims that rows and weights in 8 bits cost nothing measurable once entries above 6 are taken out, and that without
that models of 6.7e9 parameters and more break. Measured here on a small model, with and without its entries above 6 taken out,
and again with one channel behind every norm made loud, which is what breaks large models.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from waypost.bench.quantizing import Bench, Texts, figures
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique

NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norm of a layer -> the linears that it feeds."""


@technique
class QuantizeLlmInt8:
    loudness: float = 32.0
    """Factor of the loud channel; its weights are divided by it, a power of two, so that the function stays."""

    def measure(self, options: Options) -> Receipt:
        """Every folder against its source on the same texts."""
        recipes: dict[str, dict[str, Any]] = {
            "rtn": {"quantizer": {"name": "round_to_nearest", "bits": 8, "group_size": None}},
            "rtn_groups": {"quantizer": {"name": "round_to_nearest", "bits": 8, "group_size": 32}},
            "int8": {"quantizer": {"name": "llm_int8"}},
            "int8_all_rounded": {"quantizer": {"name": "llm_int8", "threshold": None}},
        }
        with tempfile.TemporaryDirectory(prefix="waypost-int8-") as scratch:
            bench = Bench(options, Texts(), Path(scratch))
            found = bench.distances(recipes)
            speed = bench.paces(["rtn", "int8"])
            loud = self._loud(bench.model, Path(scratch) / "loud")
            again = Bench(replace(options, model=str(loud)), Texts(), Path(scratch) / "of-loud")
            again.scratch.mkdir()
            louder = again.distances({name: recipes[name] for name in ("rtn", "int8", "int8_all_rounded")})
        extra = figures(found) | speed
        extra |= {f"loud_{name}": value for name, value in figures(louder).items() if not name.startswith(("mb_", "made_s_"))}
        return Receipt(
            claim="quantize.llm_int8",
            statement="KL from the model in bfloat16, rows and weights of the linears in 8 bits with entries above 6 in 16, "
            f"against weights alone in 8 bits; {len(found['rtn'].kl)} texts",
            numerics="exact",
            ours=series("LLM.int8()", "nats/token", found["int8"].kl),
            baseline=series("round to nearest, weights alone", "nats/token", found["rtn"].kl),
            higher_is_better=False,
            floor=None,
            agreement="each text has its bits alone as beside another",
            command="waypost bench quantize.llm_int8 --model CHECKPOINT",
            over="texts",
            extra=extra,
        )

    @torch.no_grad()
    def _loud(self, model: str, out: Path) -> Path:
        """A folder of the same function, in which the first channel behind every norm of a layer is large."""
        from waypost.keep.lineage import Lineage
        from waypost.keep.reader import Checkpoint
        from waypost.keep.writer import save
        from waypost.model import hf

        decoder, checkpoint = hf.load(model), Checkpoint(model)
        for layer in decoder.model.layers:
            for norm, linears in NORMS.items():
                layer.get_parameter(f"{norm}.weight")[0] *= self.loudness
                for name in linears:
                    layer.get_parameter(f"{name}.weight")[:, 0] /= self.loudness
        entries, lineage = hf.entries(decoder), Lineage(verb="bench", recipe={"loudness": self.loudness})
        return save(out, entries=entries, config=checkpoint.config, lineage=lineage, assets=checkpoint.assets())
