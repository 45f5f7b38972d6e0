"""The page of profiles: docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from waypost.bench.limits.profile import QUICKEST, Profile
from waypost.bench.peaks import Peaks


def page(profiles: Sequence[Profile], receipts: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The text of docs/performance.md."""
    lines = [
        "# Where a step's time goes",
        "",
        "Written by `python -m waypost.bench.limits`. The steps of the serving claims, taken apart: what each kind of work",
        f"took inside the step (the mean of the quickest {QUICKEST:.0%}), and the least that the machine would need for the",
        "same operations or bytes at the peaks measured in turn with it: the faster of `torch.mm` of 1024 x 1024 and our",
        "own product with 256 rows and weights in the cache, both in bfloat16; and the faster of a maximum and our own product",
        "with one row over 256 MB on huge pages. Of up to eight rows the weights lie in 12 bits (kernels/linear/compact.cpp),",
        "and bytes are counted as they lie. Who wants the likeliest token alone has a head in bytes (kernels/greedy), of",
        "whose products the processor does two for one in bfloat16. Norms, exponentials, drawing and the interpreter have no",
        "such bound and count as nothing, so the least is out of reach. Drawing was timed alone, so the last line of a table",
        "holds what the caches lost of it. Where nobody waits for single tokens, as in the serving claims, that line is spent",
        "once in up to 32 steps (serve/stride.py).",
        "",
        f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores, torch {facts['torch']}, {facts['model']} in "
        f"bfloat16, numerics exact; {facts['when']}, commit {facts['commit']}.",
        "",
    ]
    best = best_peaks(profiles, receipts, facts)
    for profile in profiles:
        lines += _section(profile, best, receipts)
    return "\n".join(lines)


def best_peaks(profiles: Sequence[Profile], receipts: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> Peaks:
    """The best that was measured on this machine, by any profile or receipt: a peak varies by a fifth between runs, so that
    one alone says little of what cannot be reached. Receipts copy memory where profiles read it; only products compare."""
    here = [r["roofline"]["peak_flops"] for r in receipts.values() if r.get("roofline") and _same(r.get("machine", {}), facts)]
    return Peaks(max([*here, *(p.peaks.flops for p in profiles)]), max(p.peaks.read_bytes for p in profiles))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other[key] for key in ("cpu", "threads", "cores"))


def _section(profile: Profile, best: Peaks, receipts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    peaks, whole, work = profile.peaks, profile.seconds, profile.work
    rows = [
        f"## {work.name[0].upper()}{work.name[1:]}: {1e3 * whole:.2f} ms, {work.answers / whole:,.0f} tokens/s",
        "",
        f"The machine beside it: {peaks.flops / 1e9:,.0f} GFLOP/s, {peaks.read_bytes / 1e9:.1f} GB/s.",
        "",
        "| what | ms | share | operations | reached | bytes | reached | least, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in profile.parts:
        done = [f"{part.flops / 1e9:,.2f} G", f"{part.flops / part.seconds / 1e9:,.0f} GFLOP/s"] if part.flops else ["", ""]
        moved = (
            [f"{part.moved_bytes / 1e6:,.0f} MB", f"{part.moved_bytes / part.seconds / 1e9:.1f} GB/s"]
            if part.moved_bytes
            else ["", ""]
        )
        least = f"{1e3 * part.least_s(peaks):.2f}" if part.flops else ""
        cells = [part.name, f"{1e3 * part.seconds:.2f}", f"{part.seconds / whole:.0%}", *done, *moved, least]
        rows.append("| " + " | ".join(cells) + " |")
    rows += ["| **the step** | " + f"**{1e3 * whole:.2f}** | | | | | | **{1e3 * profile.least_s:.2f}** |", ""]
    for name in work.claims:
        if name in receipts and receipts[name].get("floor"):
            rows += [verdict(profile, best, name, receipts[name]), ""]
    return rows


def verdict(profile: Profile, best: Peaks, name: str, receipt: Mapping[str, Any]) -> str:
    """What the claim's promise asks of a step, beside what the machine allows: at the peaks measured with the step, and, as
    those vary, at the best that were ever measured on it. Only what these do not reach is out of reach."""
    theirs, floor = receipt["baseline"]["median"], receipt["floor"]
    needed, least, surely = profile.work.answers / (floor * theirs), profile.least_s, profile.least_at(best)
    text = (
        f"`{name}` promises {floor:g} times {theirs:,.0f} tokens/s, which is a step of {1e3 * needed:.2f} ms; measured was "
        f"{receipt['ratio']:.2f} (receipt of {receipt['when']}, commit {receipt['commit']}). {_in_its_rounds(receipt)}"
        "The operations and bytes alone "
        f"take {1e3 * least:.2f} ms at these peaks, "
    )
    if needed >= least:
        share = sum(part.seconds for part in profile.parts if part.flops) / profile.seconds
        return text + (
            f"which leaves {1e3 * (needed - least):.2f} ms for all that has no bound here and for every distance from the "
            f"peaks; what is bound takes {share:.0%} of our step."
        )
    text += (
        f"and {1e3 * surely:.2f} ms at the best that were measured on this machine ({best.flops / 1e9:,.0f} GFLOP/s, "
        f"{best.read_bytes / 1e9:.1f} GB/s), "
    )
    if needed >= surely:
        return text + "so it is at the limit, within the spread of the measured peaks."
    return text + "so it is out of reach in bfloat16 on this machine."


def _in_its_rounds(receipt: Mapping[str, Any]) -> str:
    """What the peaks that were measured between the receipt's rounds would have allowed, where they were."""
    extra = receipt.get("extra", {})
    if "allowed_ratio" not in extra:
        return ""
    return (
        f"At the peaks measured between its rounds, bytes and operations alone would have allowed {extra['allowed_ratio']:.2f} "
        f"times ({extra['allowed_ratio_least']:.2f} to {extra['allowed_ratio_most']:.2f}). "
    )
