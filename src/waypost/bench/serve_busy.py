"""Claim: one stream beside a program that keeps a core busy, against the same stream alone.

Threads that wait for each other by looking alone lose whole time slices when another program brings two of them onto one core:
it had been a two-hundredth of the speed (kernels/turns.h, core/threads.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.serving import WARM_ROUNDS, WORKERS, Generating
from waypost.bench.train_step import token_rows
from waypost.bench.worker import Worker
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError, counted
from waypost.core.progress import progress


@technique
class ServeBusy:
    prompt_tokens: int = 64
    new_tokens: int = 64

    def measure(self, options: Options) -> Receipt:
        """In turn, alone and with as many busy programs as leave a core too little."""
        if options.model is None:
            raise ConfigError("serve.busy needs --model CHECKPOINT in bfloat16")
        cores = len(os.sched_getaffinity(0))
        programs = max(1, cores - options.threads + 1)
        prompt = token_rows(options.model, 1, self.prompt_tokens)
        rates: list[tuple[float, float]] = []
        with ExitStack() as stack:
            args = {"model": options.model, "numerics": "exact"}
            side = Generating(stack.enter_context(Worker(WORKERS / "serve_waypost.py", args, options.threads)))
            bar = stack.enter_context(progress("serve.busy", options.repeats + WARM_ROUNDS, "rounds"))
            for _ in range(options.repeats + WARM_ROUNDS):
                alone_s, alone = side.generate(prompt, self.new_tokens)
                with busy(programs):
                    beside_s, beside = side.generate(prompt, self.new_tokens)
                if beside != alone:
                    raise NumericsError("serve.busy: beside a busy program other tokens came than alone")
                rates.append((self.new_tokens / beside_s, self.new_tokens / alone_s))
                bar.advance(note="beside it {:.0f}, alone {:.0f} new tokens/s".format(*rates[-1]))
        rates = rates[WARM_ROUNDS:]
        return Receipt(
            claim="serve.busy",
            statement=f"one stream of {self.new_tokens} tokens, bf16, {options.threads} threads on {counted(cores, 'core')}, "
            f"beside {counted(programs, 'program')} that never {'waits' if programs == 1 else 'wait'}",
            numerics="exact",
            ours=series("beside a busy program", "new tokens/s", [r[0] for r in rates]),
            baseline=series("alone", "new tokens/s", [r[1] for r in rates]),
            higher_is_better=True,
            floor=0.25,
            agreement="the same tokens",
            command="waypost bench serve.busy --model CHECKPOINT",
        )


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many processes that never wait, of equal rights."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(programs)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()
