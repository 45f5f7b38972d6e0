"""Receipts as a person reads them: in the terminal and in Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from typing import Any

from waypost.bench import caveat_of
from waypost.bench.receipt import Options, Receipt

REPEATED = ("rounds", "seeds")
"""What repeats one measurement, so that its range is noise; lengths, texts or settings differ because they are others."""


def receipt_table(receipt: Receipt) -> str:
    """One receipt as lines of text."""
    tree = json.loads(receipt.line())
    least, most = ratio_range(tree)
    kept = {None: "", True: f"  (promised {receipt.promised}: kept", False: f"  (promised {receipt.promised}: NOT kept"}
    verdict = kept[receipt.kept] and kept[receipt.kept] + (", within noise)" if within_noise(tree) else ")")
    rows = [
        f"{receipt.claim}: {receipt.statement}",
        *([f"  but: {receipt.caveat}"] if receipt.caveat else []),
        *(
            f"  {side.what:<24} {side.median:>10,.4g} {side.unit}   +-{100 * side.spread:.1f}%  n={len(side.values)} "
            f"{receipt.over}"
            for side in (receipt.ours, receipt.baseline)
        ),
        f"  ratio (above 1 is better) {ratio(receipt.ratio):>9}  ({ratio(least)} to {ratio(most)}){verdict}",
        *_roofline_lines(receipt),
        *(f"  {name:<24} {value:>10,.4g}" for name, value in receipt.extra.items()),
        f"  outputs: {receipt.agreement}",
        f"  {receipt.machine.get('cpu', '')}, {receipt.machine.get('threads', '?')} threads, numerics {receipt.numerics}"
        + "".join(f", {name} {version}" for name, version in receipt.versions.items()),
        f"  again: {receipt.command}",
    ]
    return "\n".join(rows)


def _roofline_lines(receipt: Receipt) -> list[str]:
    """What the machine would allow by the peaks measured beside it, and how far ours is from it."""
    top = receipt.roofline
    if top is None:
        return []
    why = {
        "memory": f"{top.moved_bytes / 1e6:,.0f} MB at {top.memory_bytes / 1e9:.1f} GB/s",
        "arithmetic": f"{top.flops / 1e9:,.1f} GFLOP at {top.peak_flops / 1e9:,.0f} GFLOP/s",
    }[top.bound]
    share = receipt.ours.median / top.rate
    reached = f"ours is {share:.0%} of it" if share <= 1 else "ours is above it, so that this peak was measured too low"
    return [f"  {'roofline':<24} {top.rate:>10,.4g} {receipt.ours.unit}   ({top.bound}: {why}); {reached}"]


def claims_table(claims: Mapping[str, str], known: Mapping[str, Mapping[str, Any]]) -> str:
    """Every claim with its newest receipt."""
    wide = max([8, *(len(promised(receipt)) for receipt in known.values())])
    rows = [f"{'claim':<26} {'ratio':>6}  {'promised':<{wide}}  measured    what"]
    for name in claims:
        receipt = known.get(name)
        if receipt is None:
            rows.append(f"{name:<26} {'-':>6}  {'-':<{wide}}  never")
            continue
        what = f"{promised(receipt):<{wide}}  {receipt['when']}  {receipt['statement']}"
        rows.append(f"{name:<26} {ratio(receipt['ratio']):>6}  {what}")
    return "\n".join(rows)


def markdown(known: Mapping[str, Mapping[str, Any]]) -> str:
    """The README's table of measured claims, and under it how to read and repeat it."""
    rows = [
        "| claim | what was compared | ours | baseline | ratio | promised | of the roofline | options |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shares = roofline_shares(known)
    for name, receipt in known.items():
        base = receipt["baseline"]
        version = "".join(f" {v}" for rival, v in (receipt.get("versions") or {}).items() if rival in base["what"])
        rows.append(
            f"| `{name}` | {_what(name, receipt)} | {_quantity('ours', receipt)} | {base['what']}{version}: "
            f"{_quantity('baseline', receipt)} | {_ratio(receipt)} | {promised(receipt)} | {shares[name]} "
            f"| {options(receipt)} |"
        )
    return "\n".join([*rows, "", *_caption(known)])


def comparison(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Receipts of techniques as a careful table: the result with its spread, what was promised, in how many rounds it was
    better, and all else that was measured beside it (costs, other settings), so that a negative result stands as plainly as
    a positive one."""
    rows = [
        "| claim | what was compared | result | promised | in the rounds | beside it | options |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, receipt in known.items():
        sides = (f"{receipt[side]['what']}: {_quantity(side, receipt)}" for side in ("ours", "baseline"))
        result = f"{'; '.join(sides)}; ratio {_ratio(receipt)}"
        beside = ", ".join(f"{key} {value:.4g}" for key, value in receipt.get("extra", {}).items())
        cells = (promised(receipt), rounds(receipt), beside or "-", options(receipt))
        rows.append(f"| `{name}` | {_what(name, receipt)} | {result} | {' | '.join(cells)} |")
    return "\n".join(rows)


def rounds(receipt: Mapping[str, Any]) -> str:
    """In how many rounds ours was the better side; no threshold, no test: so few rounds bear no more."""
    found = _ratios(receipt)
    better, worse = sum(r > 1 for r in found), sum(r < 1 for r in found)
    if better == worse == 0:
        return f"equal in all {len(found)}{_over(receipt)}"
    return f"{'better' if better >= worse else 'worse'} in {max(better, worse)} of {len(found)}{_over(receipt)}"


def ratio_range(receipt: Mapping[str, Any]) -> tuple[float, float]:
    """The smallest and the largest of the rounds' ratios."""
    found = _ratios(receipt)
    return min(found), max(found)


def within_noise(receipt: Mapping[str, Any]) -> bool:
    """Whether a promise was reached in some rounds and missed in others, so that its verdict might have been the other."""
    if receipt.get("over", "rounds") not in REPEATED:
        return False
    verdicts = []
    if receipt["floor"] is not None:
        verdicts.append({r >= receipt["floor"] for r in _ratios(receipt)})
    if receipt.get("limit") is not None:
        higher, limit = receipt["higher_is_better"], receipt["limit"]
        verdicts.append({value >= limit if higher else value <= limit for value in receipt["ours"]["values"]})
    return any(len(found) == 2 for found in verdicts)


def promised(receipt: Mapping[str, Any]) -> str:
    """The promise of a receipt that was read back, whether it was kept, and whether the rounds agree on that."""
    if receipt["floor"] is None and not receipt.get("promised"):
        return "-"
    kept = receipt.get("kept")
    if kept is None:  # receipts of before it was written down
        kept = receipt["floor"] is None or receipt["ratio"] >= receipt["floor"]
    said = receipt.get("promised") or f"{receipt['floor']:g}"
    return f"{said}, {'kept' if kept else 'missed'}{' within noise' if within_noise(receipt) else ''}"


def options(receipt: Mapping[str, Any]) -> str:
    """What follows on `waypost bench CLAIM` to measure it again; the threads are those that the machine's facts have."""
    asked = re.sub(r" --threads \d+", "", receipt["command"]).split()[3:]
    threads = receipt.get("machine", {}).get("threads", Options().threads)
    if threads != Options().threads:
        asked += ["--threads", str(threads)]
    return f"`{' '.join(asked)}`" if asked else "-"


def ratio(value: float) -> str:
    """Three decimals up to just above 1, where the third one is the news."""
    return f"{value:.3f}" if value < 1.1 else f"{value:.2f}"


def roofline_shares(known: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Claim -> ours as a share of what its machine would allow, and what binds; "-" where there is none.

    The machine's peaks are the best that any of the receipts measured on it: neighbours halve its bandwidth from one minute
    to the next, and a row beside whose peak they were busy would stand above 100%. The best is nearest to what the machine
    can do, and the hardest on us. What still passes it was measured better than the peak, of which nothing can be said.
    """
    with_top = {name: receipt for name, receipt in known.items() if receipt.get("roofline")}
    peaks: dict[str, tuple[float, float]] = {}
    for receipt in with_top.values():
        machine, top = _machine(receipt.get("machine", {})), receipt["roofline"]
        flops, moved = peaks.get(machine, (0.0, 0.0))
        peaks[machine] = max(flops, top["peak_flops"]), max(moved, top["memory_bytes"])
    shares = dict.fromkeys(known, "-")
    for name, receipt in with_top.items():
        top = receipt["roofline"]
        flops, moved = peaks[_machine(receipt.get("machine", {}))]
        work = top["rate"] * max(top["flops"] / top["peak_flops"], top["moved_bytes"] / top["memory_bytes"])  # tokens
        computing, moving = top["flops"] / flops, top["moved_bytes"] / moved
        share = receipt["ours"]["median"] / (work / max(computing, moving))
        if share <= 1:
            shares[name] = f"{share:.0%} ({'memory' if moving > computing else 'arithmetic'})"
    return shares


def _caption(known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    machines: dict[str, list[str]] = {}
    for name, receipt in known.items():
        if receipt.get("machine"):
            machines.setdefault(_machine(receipt["machine"]), []).append(f"`{name}`")
    most, *others = sorted(machines, key=lambda each: -len(machines[each])) or [""]
    repeats = min(len(r["ours"]["values"]) for r in known.values() if r.get("over", "rounds") in REPEATED)
    return [
        f"Medians of {repeats} rounds or more, +- half their range over the median. The ratio is the median of the rounds',",
        "with the least and the most; above 1 is better for Waypost. A promise that only some rounds reach is kept or missed",
        "within noise. The roofline is the rate that the machine's memory or matrix units would allow (`bench/roofline.py`) at",
        "the best that any row here measured; - where there is none or a row passes it. Again with `waypost bench CLAIM` and",
        "the row's options; CHECKPOINT is a model, ENV the environment of a rival.",
        *([f"Measured on {most}{', where nothing else is said' * bool(others)}."] if most else []),
        *(f"On {other}: {', '.join(machines[other])}." for other in others),
    ]


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores, torch {facts['torch']}" if facts else ""


def _what(name: str, receipt: Mapping[str, Any]) -> str:
    """The statement, and what a reader must know beside it."""
    caveat = caveat_of(name, receipt.get("caveat") or "")
    return receipt["statement"] + (f". *But: {caveat}.*" if caveat else "")


def _over(receipt: Mapping[str, Any]) -> str:
    over = receipt.get("over", "rounds")
    return "" if over == "rounds" else f" {over}"


def _ratios(receipt: Mapping[str, Any]) -> list[float]:
    """Of each round, above 1 is better for ours; a baseline of nothing is infinitely far."""
    sides = (receipt["ours"]["values"], receipt["baseline"]["values"])
    above, below = sides if receipt["higher_is_better"] else sides[::-1]
    return [a / b if b else (1.0 if a == b else float("inf")) for a, b in zip(above, below, strict=True)]


def _ratio(receipt: Mapping[str, Any]) -> str:
    least, most = (ratio(value) for value in ratio_range(receipt))
    return f"**{ratio(receipt['ratio'])}** ({least} to {most})"


def _quantity(side: str, receipt: Mapping[str, Any]) -> str:
    """Median and unit of a side, and half the range of its rounds; of what are not rounds, from where to where."""
    values, unit = receipt[side]["values"], receipt[side]["unit"]
    middle = f"{statistics.median(values):,.4g} {unit}"
    if receipt.get("over", "rounds") in REPEATED:
        return f"{middle} +-{100 * receipt[side]['spread']:.0f}%"
    return f"{middle} ({min(values):,.4g} to {max(values):,.4g} over {len(values)} {receipt['over']})"
