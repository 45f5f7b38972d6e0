"""What a step cost and gave, as the line that is logged. Counting only; nothing here changes a run."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

from waypost.measure.flops import training_flops
from waypost.model.config import ModelConfig
from waypost.train.reweighing import UNWEIGHTED
from waypost.train.trainer import Position, StepReport


def step_line(report: StepReport, at: Position, config: ModelConfig, peak_flops: float) -> dict[str, Any]:
    """A line of metrics.jsonl. `peak_flops` is what all ranks together could do at most, measured."""
    mean_length = 2 * report.attended / report.tokens - 1  # of sequences that attend to as many keys
    flops = report.tokens * training_flops(config, max(1, round(mean_length))) / report.seconds
    nats = report.extra.get(UNWEIGHTED, report.loss) * report.weight  # a text's bytes are there once, however it is weighed
    bits = {"bits_per_byte": nats / math.log(2) / report.bytes} if report.bytes else {}
    return {
        "step": at.step,
        "tokens": at.tokens,
        "loss": report.loss,
        **bits,
        **report.extra,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "learned_tokens": report.weight,
        "step_seconds": report.seconds,
        "tokens_per_s": report.tokens / report.seconds,
        "flops_per_s": flops,
        "peak_frac": flops / peak_flops,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
