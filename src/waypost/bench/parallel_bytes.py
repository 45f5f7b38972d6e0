"""Claims: tensor and expert parallel hand to collectives the bytes that their formulas say; what they cost beside it.

The ratio is formula against measurement, so that it is a count and not a time. Seconds and memory of a step stand in the
receipt's extra numbers, for one process (single) and for two (fsdp, and the technique): on one machine two processes share
the cores of one, so nothing gets faster, and what a rank holds besides its share of a small model outweighs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.worker import Worker
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress

WORKER = Path(__file__).parent / "workers" / "parallel_side.py"

DENSE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    **DENSE,
    "model_type": "mixtral",
    "intermediate_size": 192,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@technique
class ParallelTensor:
    rows: int = 8
    seq_len: int = 128

    def measure(self, options: Options) -> Receipt:
        """Two ranks: bytes that each all-reduces for a micro-batch, against `train.parallel.tensor.message_bytes`."""
        from waypost.model import hf
        from waypost.train.parallel.tensor import message_bytes

        tokens = self.rows * self.seq_len
        want = 2.0 * message_bytes(hf.config_from_hf(DENSE), tokens, tokens, 4)
        return _measure("tensor", "all_reduce", DENSE, self.rows, self.seq_len, options, lambda found: want)


@technique
class ParallelExpert:
    rows: int = 8
    seq_len: int = 128

    def measure(self, options: Options) -> Receipt:
        """Two ranks: bytes that they exchange for a micro-batch, against 4 s C A' + 8 E (R - 1) for each mixture layer."""
        layers, width, experts = (MIXTURE[key] for key in ("num_hidden_layers", "hidden_size", "num_local_experts"))

        def formula(found: Mapping[str, float]) -> float:
            return 4.0 * 4 * width * found["away"] + layers * 8.0 * experts

        return _measure("expert", "all_to_all", MIXTURE, self.rows, self.seq_len, options, formula)


def _measure(
    name: str, kind: str, config: Mapping[str, Any], rows: int, seq_len: int, options: Options, formula: Any
) -> Receipt:
    """Rounds of steps of single, fsdp and `name` in turn; their losses agree; bytes counted once a round."""
    sides = {"single": 1, "fsdp": 2, name: 2}
    given: list[float] = []
    said: list[float] = []
    times: dict[str, Any] = {}
    with ExitStack() as stack, progress(f"parallel.{name}", options.repeats, "rounds") as bar:
        workers = {}
        for layout, ranks in sides.items():
            args = {"layout": layout, "ranks": ranks, "config": config, "rows": rows, "seq_len": seq_len}
            workers[layout] = stack.enter_context(Worker(WORKER, args, max(1, options.threads // ranks)))
        first = {layout: worker.call("step", count=1) for layout, worker in workers.items()}
        gap = max(abs(one["loss"] - first["single"]["loss"]) for one in first.values())
        if gap > 1e-5 * first["single"]["loss"]:
            raise NumericsError(f"parallel.{name}: first losses differ by {gap}: { {k: v['loss'] for k, v in first.items()} }")
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(options.repeats):
            found = workers[name].call("traffic")
            given.append(found[kind])
            said.append(formula(found))
            if given[-1] != said[-1]:  # fewer would be as wrong as more
                raise NumericsError(f"parallel.{name}: {given[-1]:.0f} bytes were counted, the formula says {said[-1]:.0f}")
            times = {layout: worker.call("step", count=3) for layout, worker in workers.items()}
            best = {layout: min(best[layout], times[layout]["seconds"]) for layout in sides}
            bar.advance(note=", ".join(f"{layout} {times[layout]['seconds']:.2f} s" for layout in sides))
        fsdp = workers["fsdp"].call("traffic")
    extra = {f"{layout}_step_s": best[layout] for layout in sides}
    extra |= {f"{layout}_peak_mb_a_rank": times[layout]["peak_bytes"] / 1e6 for layout in sides}
    extra |= {"fsdp_mb": (fsdp["all_gather"] + fsdp["reduce_scatter"]) / 1e6}
    return Receipt(
        claim=f"parallel.{name}",
        statement=f"bytes that two ranks hand to {kind.replace('_', '-')} for a micro-batch of {rows}x{seq_len} tokens in "
        f"float32 under `parallel: {name}`, against its formula; a count, while on one machine nothing gets faster",
        numerics="exact",
        ours=series("counted", "MB", [value / 1e6 for value in given]),
        baseline=series("formula", "MB", [value / 1e6 for value in said]),
        higher_is_better=False,
        floor=1.0,
        agreement="every count is the formula's to the byte; loss of the first step "
        f"{first['single']['loss']:.6f} on one rank, to {gap:.0e} on two",
        command=f"waypost bench parallel.{name}",
        extra=extra,
    )
