"""Batched greedy generation with vLLM on the CPU. Imports nothing of Waypost's but the call loop."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

args = json.loads(sys.argv[1])
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GB; the default asks for more than small machines have
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as the others, and as free as theirs
    "OMP_NUM_THREADS": str(args["threads"]),
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

sys.path.insert(0, str(Path(__file__).parents[3]))
from waypost.bench.worker import peak_bytes, serve, take_stdout  # noqa: E402

answers = take_stdout()

from vllm import LLM, SamplingParams  # noqa: E402  # reads its environment when it is imported, and prints
from vllm.inputs import TokensPrompt  # noqa: E402

NGRAMS = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
"""Five guesses, as in vLLM's documentation (ours makes up to eight), by the ends of a text that ours looks for."""


def main() -> None:
    engine = LLM(
        args["model"], dtype="bfloat16", max_model_len=2048, enforce_eager="eager" in args, enable_prefix_caching=False,
        max_num_batched_tokens=2048, disable_log_stats=True, speculative_config=NGRAMS if "ngrams" in args else None,
    )  # fmt: skip

    def generate(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        began = time.perf_counter()
        done = engine.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = [list(answer.outputs[0].token_ids) for answer in done]
        return {"seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes()}

    serve({"generate": generate}, answers)


if __name__ == "__main__":
    main()
