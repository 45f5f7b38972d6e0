"""`python -m waypost.bench.limits --model CHECKPOINT --out docs/performance.md`: measures the steps and writes the page."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

from waypost.bench.limits.page import page
from waypost.bench.limits.profile import WORKS, measure
from waypost.bench.receipt import commit, latest, machine_facts
from waypost.core.progress import progress


def main() -> None:
    from waypost.serve.engine import Engine

    parser = argparse.ArgumentParser(prog="python -m waypost.bench.limits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="CHECKPOINT", help="a dense checkpoint in bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each step, peaks between them")
    parser.add_argument("--receipts", type=Path, default=Path("benchmarks/receipts"), help="of the claims the page speaks of")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the page goes; without it, it is printed")
    args = parser.parse_args()
    engine = Engine(args.model, threads=args.threads, prefix_cache=False, drafting=None)
    profiles = []
    with progress("limits", len(WORKS), "steps") as bar:
        for work in WORKS:
            profiles.append(measure(engine, work, args.rounds))
            bar.advance(note=f"{work.name}: {1e3 * profiles[-1].seconds:.2f} ms")
    about = {"model": Path(args.model).name, "when": date.today().isoformat(), "commit": commit()}
    text = page(profiles, latest(args.receipts), {**machine_facts(args.threads), **about})
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
