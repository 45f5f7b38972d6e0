"""Claim: what an asynchronous save costs the trainer's thread, against torch.distributed.checkpoint's `async_save`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.train_step import WORKERS, token_rows
from waypost.bench.worker import Worker
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import progress

WORKER = WORKERS / "keep_state.py"


@technique
class KeepStall:
    rows: int = 2
    seq_len: int = 512

    def measure(self, options: Options) -> Receipt:
        """Both train in float32 on the same rows and save every step, in turn; each save is on disk before the next round."""
        if options.model is None:
            raise ConfigError("keep.stall needs --model CHECKPOINT: any checkpoint; its state in float32 is what is saved")
        rows = token_rows(options.model, self.rows, self.seq_len)
        with tempfile.TemporaryDirectory(prefix="keep-stall-") as folder:
            args = {"model": options.model, "rows": rows, "numerics": "exact"}
            homes = [Path(folder, side) for side in ("ours", "theirs")]
            for home in homes:
                home.mkdir()
            with (
                progress("keep.stall", options.repeats + 2, "rounds") as bar,
                Worker(WORKER, {**args, "folder": str(homes[0])}, options.threads) as ours,
                Worker(WORKER, {**args, "folder": str(homes[1])}, options.threads) as theirs,
            ):
                facts = ours.call("attach", copies=2)
                ours.call("step"), theirs.call("step")
                bar.advance()
                rounds = []
                for number in range(options.repeats + 1):
                    mine = ours.call("kept_steps", count=1, due=[0])
                    ours.call("drain")
                    rounds.append((mine, theirs.call("dcp_step", number=number)))
                    bar.advance(note=f"stalls {mine['stall_s']:.3f} and {rounds[-1][1]['stall_s']:.3f} s")
                digests = ours.call("digest_disk")["digest"], theirs.call("digest_dcp", number=options.repeats)["digest"]
                kept = ours.call("keeper_bytes")
                ours.call("finish")
        if digests[0] != digests[1]:
            raise NumericsError(f"keep.stall: the two saves of the last step hold different states: {digests}")
        del rounds[0]  # the first of each side takes fresh memory
        peaks = [side["peak_bytes"] / 1e9 for side in rounds[-1]]
        return Receipt(
            claim="keep.stall",
            statement=f"seconds that an asynchronous save of {facts['state_bytes'] / 1e9:.2f} GB keeps a training step of "
            f"{self.rows}x{self.seq_len} tokens waiting, against torch.distributed.checkpoint's async_save",
            numerics="exact",
            ours=series("waypost, keeper", "s", [mine["stall_s"] for mine, _ in rounds]),
            baseline=series("dcp.async_save", "s", [other["stall_s"] for _, other in rounds]),
            higher_is_better=False,
            floor=10.0,
            agreement="the last checkpoints of both sides hold the same bytes in every tensor",
            command="waypost bench keep.stall --model CHECKPOINT",
            caveat=f"it is paid for in memory: the trainer held {peaks[0]:.2f} GB at most, with the keeper's copies, which it "
            f"maps, against {peaks[1]:.2f} GB",
            extra={
                "state_gb": facts["state_bytes"] / 1e9,
                "keeper_snapshots_gb": kept["held"] / 1e9,
                "keeper_peak_gb": kept["peak"] / 1e9,
                "late_gb": rounds[-1][0]["late_bytes"] / 1e9,
                "peak_gb": peaks[0],
                "baseline_peak_gb": peaks[1],
            },
        )
