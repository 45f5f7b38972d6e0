"""Batched generation with Waypost's engine."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from waypost.bench.worker import peak_bytes, serve
from waypost.core.batch import Batch
from waypost.model.head import token_log_probs
from waypost.serve.engine import Engine
from waypost.serve.sampling import Sampling


def main() -> None:
    args = json.loads(sys.argv[1])
    # Each round asks the same again: without the cache, so that prefill is computed and not found. Steps may be as large as the
    # rival's (serve_vllm.py), so that all streams begin together; as on the other sides nobody asks for text, and no token is
    # guessed unless a claim is about that.
    engine = Engine(
        args["model"], numerics=args["numerics"], threads=args["threads"], dtype=torch.bfloat16, prefix_cache=False,
        max_batch_tokens=2048, drafting=args.get("drafting"),
    )  # fmt: skip
    engine.tokenizer = None

    def generate(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        sampling = Sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        began = time.perf_counter()
        done = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": [c.choices[0].token_ids for c in done], "peak_bytes": peak_bytes()}

    def score(prompt: list[int], answer: list[int]) -> list[float]:
        """log p of each token of the answer."""
        ids = prompt + answer
        scores = token_log_probs(engine.model, Batch.of([ids[:-1]], targets=[ids[1:]]))
        return scores[len(prompt) - 1 :].tolist()

    serve({"generate": generate, "score": score})


if __name__ == "__main__":
    main()
