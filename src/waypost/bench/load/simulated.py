"""Claim: the simulator says beforehand what a server's clients will see."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import field, replace

import numpy as np

from waypost.bench.figure import Figure, Panel
from waypost.bench.load.claim import serving
from waypost.bench.load.drive import Report, Target, closed_loop, open_loop
from waypost.bench.load.traffic import Ask, Lognormal, drawn
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import progress
from waypost.serve.costs import Sample, StepCosts, attended, fit
from waypost.serve.scheduling import Chunked
from waypost.serve.simulator import PERCENTILES, Arrival, Simulation, simulate

Seen = dict[str, Sequence[float]]
"""What -> seconds, one for each request or gap."""
PROBES = 2
"""Prompts of each length, and eights of tokens of each stream, from which the costs of steps are measured before a part."""
REFERENCE = (8, 8 * 64.0)
"""(tokens, keys) of the step by which the machine's speed at different times is compared: eight streams."""
INSTANT_S = 1e-4
"""What tokens that came in one piece are taken to be apart."""


@technique
class ServeSimulator:
    requests: int = 64
    rate_per_s: float = 4.0
    """Requests a second, in open loop: about half of what a 135M model serves on two cores."""
    num_pages: int = 2048
    prompts: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    """Tokens of the prompts from which costs are measured; at most what one step holds."""
    widths: list[int] = field(default_factory=lambda: [1, 4, 8, 16])
    """Numbers of streams from which costs are measured."""
    parts: int = 8
    """Pieces of the trace, each served alone with the costs of steps measured just before it: a machine whose speed changes
    within a round is met as it is, and the prediction still comes first."""
    worst: float = 0.25
    """What the claim promises: the median error of a predicted percentile, as a share of the served one."""

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= self.requests:
            raise ConfigError(f"ServeSimulator.parts={self.parts}: must be in 1..requests={self.requests}")

    def measure(self, options: Options) -> Receipt:
        """Each round takes the trace part by part: measures the costs of steps on the server, simulates the part with them,
        and then sends it there. Its percentiles are over all parts."""
        if options.model is None:
            raise ConfigError("serve.simulator needs --model CHECKPOINT")
        asks = drawn(
            self.requests, self.rate_per_s, Lognormal(median=64, most=512), Lognormal(median=48, sigma=0.4, most=96), seed=1
        )
        costs: list[StepCosts] = []
        simulated, served = Seen(), Seen()
        ours, defaults = [], []
        flags = ["--num-pages", str(self.num_pages), "--no-prefix-cache", "--drafting", "none"]  # none of which is simulated
        with (
            serving(options.model, options.threads, *flags) as target,
            progress("serve.simulator", options.repeats, "rounds") as bar,
        ):
            asyncio.run(open_loop(target, asks[: self.requests // 4], seed=99))
            for turn in range(options.repeats):
                simulated, guessed, served = Seen(), Seen(), Seen()
                for index, part in enumerate(pieces(asks, self.parts)):
                    seed = turn * self.parts + index
                    costs.append(fit(asyncio.run(observed(target, self.prompts, self.widths, seed=100 + seed))))
                    simulated = joined(simulated, of_simulation(self._simulate(part, costs[-1])))
                    guessed = joined(guessed, of_simulation(self._simulate(part, StepCosts())))
                    served = joined(served, of_report(answered(asyncio.run(open_loop(target, part, seed=seed)))))
                ours.append(error(simulated, served))
                defaults.append(error(guessed, served))
                bar.advance(note=f"error {ours[-1]:.0%}, with default costs {defaults[-1]:.0%}")
        return self._receipt(costs, simulated, served, ours, defaults)

    def _receipt(
        self, costs: Sequence[StepCosts], simulated: Seen, served: Seen, ours: list[float], defaults: list[float]
    ) -> Receipt:
        """`costs` of every part of every round; `simulated` and `served` in the last round; the errors of each."""
        speeds = [c.base_s + c.token_s * REFERENCE[0] + c.key_s * REFERENCE[1] for c in costs]
        return Receipt(
            claim="serve.simulator",
            statement="median error of the simulator's percentiles (50, 90, 99; time to the first token, between tokens, whole "
            f"requests) at {self.rate_per_s:g} requests a second, in {self.parts} parts with step costs measured just before "
            "each, against default ones",
            numerics="exact",
            ours=series("measured costs", "relative error", ours),
            baseline=series("default costs", "relative error", defaults),
            higher_is_better=False,
            floor=None,
            limit=self.worst,
            agreement="every request of the trace was answered with as many tokens as were simulated",
            command="waypost bench serve.simulator --model CHECKPOINT",
            extra={
                "base_s": costs[-1].base_s,
                "token_s": costs[-1].token_s,
                "key_s": costs[-1].key_s,
                "slowest_over_fastest": max(speeds) / min(speeds),  # of a step of eight streams, over all parts
                **{
                    f"{what.replace(' ', '_')}_p{p}_{side}_s": float(np.percentile(seen[what], p))
                    for what in served
                    for p in PERCENTILES
                    for side, seen in (("simulated", simulated), ("served", served))
                },
            },
            figure=Figure(
                f"{self.requests} requests at {self.rate_per_s:g} a second, last round",
                [panel(what, simulated[what], served[what]) for what in served],
            ),
        )

    def _simulate(self, asks: Sequence[Ask], costs: StepCosts) -> Simulation:
        trace = [Arrival(a.at_s, a.prompt_tokens, a.new_tokens) for a in asks]
        return simulate(trace, policy=Chunked(), costs=costs, num_pages=self.num_pages)


def pieces(asks: Sequence[Ask], parts: int) -> list[list[Ask]]:
    """`asks` in `parts` pieces of about equal number, each beginning at 0 s with its first request."""
    bounds = [len(asks) * i // parts for i in range(parts + 1)]
    cut = [asks[begin:end] for begin, end in itertools.pairwise(bounds)]
    return [[replace(ask, at_s=ask.at_s - part[0].at_s) for ask in part] for part in cut]


def joined(one: Seen, other: Seen) -> Seen:
    """What was seen in both."""
    return {what: [*one.get(what, ()), *seconds] for what, seconds in other.items()}


def answered(report: Report) -> Report:
    """`report`; NumericsError unless every request got as many tokens as it asked for."""
    if any(o.finish_reason != "length" for o in report.outcomes):
        raise NumericsError(f"serve.simulator: not all was answered: {[o.error for o in report.outcomes if o.error]}")
    return report


async def observed(target: Target, prompts: Sequence[int], widths: Sequence[int], seed: int) -> list[Sample]:
    """Steps as a server's clients see them, its own work for each answer included: prompts alone, each one step to its first
    token, and streams that began together, whose gaps are steps. Medians, since the trace meets the machine as it is."""
    samples = []
    for length in prompts:
        report = await closed_loop(target, [Ask(0.0, length, 1)] * PROBES, 1, seed=seed)
        samples.append(Sample(length, attended(length, 0), max(INSTANT_S, report.percentile("first", 50))))
    for width in widths:
        report = await closed_loop(target, [Ask(0.0, 8, 8 * PROBES)] * width, width, seed=seed)
        samples.append(Sample(width, width * (8 + 4.0 * PROBES), max(INSTANT_S, report.percentile("between", 50))))
    return samples


def of_simulation(simulation: Simulation) -> Seen:
    """What its requests met."""
    return {
        "first token": [s.first_token_s for s in simulation.served],
        "between tokens": [float(gap) for s in simulation.served for gap in np.diff(s.token_s)],
        "request": [s.total_s for s in simulation.served],
    }


def of_report(report: Report) -> Seen:
    """What a server's clients met."""
    return {
        "first token": [o.token_s[0] for o in report.outcomes],
        "between tokens": [float(gap) for o in report.outcomes for gap in np.diff(o.token_s)],
        "request": [o.token_s[-1] for o in report.outcomes],
    }


def error(simulated: Seen, served: Seen) -> float:
    """The median, over what was seen and its percentiles, of |simulated - served| / served."""
    pairs = ((np.percentile(simulated[what], p), np.percentile(served[what], p)) for what in served for p in PERCENTILES)
    return statistics.median(float(abs(a - b) / b) for a, b in pairs)


def panel(what: str, simulated: Sequence[float], served: Sequence[float]) -> Panel:
    """Milliseconds by percentile, predicted and seen."""

    def line(seconds: Sequence[float]) -> list[tuple[float, float]]:
        return [(p, float(f"{1e3 * np.percentile(seconds, p):.4g}")) for p in (*range(0, 100, 5), 99)]

    return Panel(what, "percentile", "milliseconds", {"simulated": line(simulated), "served": line(served)})
