"""Claims: loading what another number of ranks saved, against torch.distributed.checkpoint."""

from __future__ import annotations

from waypost.bench.keep_save import must_agree, scratch, side
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.progress import progress


def _reshard(options: Options, claim: str, before: int, after: int) -> Receipt:
    """Saves rows of every tensor on `before` ranks, loads on `after`; each side reads its own file, from warm pages. The ranks
    of a side share the threads, so that none waits for a core that another one has."""
    each = max(1, options.threads // after)
    times: dict[str, list[float]] = {"waypost": [], "dcp": []}
    with scratch(options, claim) as (model, folder):
        for name in times:
            with side(name, model, before, options.threads) as saver:
                saver.call("save", folder=str(folder / name))
        with (
            side("waypost", model, after, each) as ours,
            side("dcp", model, after, each) as theirs,
            progress(claim, options.repeats, "rounds") as bar,
        ):
            for name, worker in (("waypost", ours), ("dcp", theirs)):
                must_agree(worker, folder / name, model)
            for _ in range(options.repeats):
                for name, worker in (("waypost", ours), ("dcp", theirs)):
                    times[name].append(worker.call("load", folder=str(folder / name)))
                bar.advance(note=f"{times['waypost'][-1]:.2f} s, DCP {times['dcp'][-1]:.2f} s")
    return Receipt(
        claim=claim,
        statement=f"loading on {after} rank{'s' * (after > 1)} what {before} saved, model and AdamW state in float32, against "
        "torch.distributed.checkpoint",
        numerics="none",
        ours=series("waypost", "s", times["waypost"]),
        baseline=series("dcp.load", "s", times["dcp"]),
        higher_is_better=False,
        floor=1.0,
        agreement="both hold the saved state, bit for bit",
        command=f"waypost bench {claim} --model CHECKPOINT",
        caveat="" if after == 1 else f"the ranks of each side share one machine, {each} thread{'s' * (each > 1)} each",
    )


@technique
class KeepGather:
    def measure(self, options: Options) -> Receipt:
        """From the rows of two ranks to one."""
        return _reshard(options, "keep.gather", 2, 1)


@technique
class KeepScatter:
    def measure(self, options: Options) -> Receipt:
        """From one rank to the rows of two."""
        return _reshard(options, "keep.scatter", 1, 2)
