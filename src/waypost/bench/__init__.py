"""Level 8: claims and how they are measured. A claim is one file; its result is a receipt, one JSON line."""

from __future__ import annotations

from collections.abc import Mapping

CLAIMS: Mapping[str, str] = {
    "train.step": "waypost.bench.train_step:TrainStep",
    "train.lamb": "waypost.bench.train_lamb:TrainLamb",
    "train.osp": "waypost.bench.train_outlier_safe:TrainOutlierSafe",
    "train.ul2": "waypost.bench.train_ul2:TrainUl2",
    "train.reweighting": "waypost.bench.train_reweighting:TrainReweighting",
    "select.cld": "waypost.bench.select_cld:SelectCld",
    "train.balancing": "waypost.bench.train_balancing:TrainBalancing",
    "train.adadagrad": "waypost.bench.train_adadagrad:TrainAdAdaGrad",
    "train.lora": "waypost.bench.train_lora:TrainLora",
    "laws.step": "waypost.bench.laws_step:LawsStep",
    "serve.batch": "waypost.bench.serve_batch:ServeBatch",
    "serve.adapters": "waypost.bench.serve_adapters:ServeAdapters",
    "serve.start": "waypost.bench.serve_start:ServeStart",
    "serve.start.torch": "waypost.bench.serve_start:StartTorch",
    "serve.busy": "waypost.bench.serve_busy:ServeBusy",
    "serve.load": "waypost.bench.load.claim:ServeLoad",
    "serve.simulator": "waypost.bench.load.simulated:ServeSimulator",
    "serve.prefill.llama": "waypost.bench.serve_prefill:PrefillLlama",
    "serve.prefill.vllm": "waypost.bench.serve_prefill:PrefillVllm",
    "serve.prefill.transformers": "waypost.bench.serve_prefill:PrefillTransformers",
    "serve.stream.llama": "waypost.bench.serve_stream:StreamLlama",
    "serve.stream.vllm": "waypost.bench.serve_stream:StreamVllm",
    "serve.pass.vllm": "waypost.bench.serve_stream:PassVllm",
    "serve.streams16.llama": "waypost.bench.serve_streams:Streams16Llama",
    "serve.streams16.vllm": "waypost.bench.serve_streams:Streams16Vllm",
    "serve.streams32.llama": "waypost.bench.serve_streams:Streams32Llama",
    "serve.streams32.vllm": "waypost.bench.serve_streams:Streams32Vllm",
    "exact.prefill": "waypost.bench.exact_cost:ExactPrefill",
    "exact.stream": "waypost.bench.exact_cost:ExactStream",
    "exact.streams": "waypost.bench.exact_cost:ExactStreams",
    "exact.step": "waypost.bench.exact_cost:ExactStep",
    "plan.memory": "waypost.bench.plan_memory:PlanMemory",
    "plan.time": "waypost.bench.plan_time:PlanTime",
    "metrics.capacity": "waypost.bench.metrics_capacity:MetricsCapacity",
    "memory.stream": "waypost.bench.memory_stream:MemoryStream",
    "memory.seco": "waypost.bench.memory_stream:MemorySeco",
    "parallel.tensor": "waypost.bench.parallel_bytes:ParallelTensor",
    "parallel.expert": "waypost.bench.parallel_bytes:ParallelExpert",
    "scheduling.layered": "waypost.bench.scheduling_layered:SchedulingLayered",
    "kv.h2o": "waypost.bench.kv_h2o:KvH2O",
    "drafting.ngram": "waypost.bench.drafting:DraftingNGram",
    "drafting.trigram": "waypost.bench.drafting:DraftingTrigram",
    "merge.linear": "waypost.bench.merge_linear:MergeLinear",
    "merge.lcsc": "waypost.bench.merge_lcsc:MergeLcsc",
    "upcycle.sparse": "waypost.bench.upcycle_sparse:UpcycleSparse",
    "upcycle.experts": "waypost.bench.upcycle_experts:UpcycleExperts",
    "quantize.gptq": "waypost.bench.quantize_gptq:QuantizeGptq",
    "quantize.llm_int8": "waypost.bench.quantize_llm_int8:QuantizeLlmInt8",
    "keep.save": "waypost.bench.keep_save:KeepSave",
    "keep.disk": "waypost.bench.keep_save:KeepDisk",
    "keep.gather": "waypost.bench.keep_load:KeepGather",
    "keep.scatter": "waypost.bench.keep_load:KeepScatter",
    "keep.stall": "waypost.bench.keep_stall:KeepStall",
    "keep.step": "waypost.bench.keep_step:KeepStep",
    "keep.resume": "waypost.bench.keep_resume:KeepResume",
}
"""Name -> class. A claim is a frozen dataclass with the verb `measure(options) -> Receipt`."""

TRIED: Mapping[str, str] = {
    "train.lamb": "train/optimizers/lamb",
    "train.osp": "train/optimizers/muon",
    "train.ul2": "train/objectives/ul2",
    "train.reweighting": "train/reweighting/loss_based",
    "select.cld": "data/selectors/cld",
    "train.balancing": "train/balancing/global_batch",
    "train.adadagrad": "train/batch_sizes/adadagrad",
    "metrics.capacity": "measure/metrics/information_capacity",
    "memory.stream": "train/memory/stream_bp",
    "memory.seco": "train/memory/seco",
    "parallel.tensor": "train/parallel/tensor",
    "parallel.expert": "train/parallel/expert",
    "train.lora": "model/adapters/lora",
    "laws.step": "plan/laws/step_law",
    "serve.adapters": "model/adapters/lora",
    "scheduling.layered": "serve/scheduling/layered",
    "kv.h2o": "serve/kv/h2o",
    "drafting.ngram": "serve/drafting/ngram",
    "drafting.trigram": "serve/drafting/trigram",
    "merge.lcsc": "transform/merging/lcsc",
    "upcycle.sparse": "transform/upcycling/sparse_upcycling",
    "upcycle.experts": "transform/upcycling/expert_upcycling",
    "quantize.gptq": "transform/quantizing/gptq",
    "quantize.llm_int8": "transform/quantizing/llm_int8",
}
"""Claim -> the technique that it tries, as its file without `.py`: the catalogue shows the receipt under its table. Claims
that are not here are about the whole."""

_OUR_FAST_MODE = (
    "in bf16 on a CPU fast runs the operators of exact, since PyTorch's products and attention are no faster; what engines "
    "without the promise reach is in serve.prefill.transformers and serve.streams16.vllm"
)
_TOLD_TOGETHER = (
    "tokens are told ten times a second, as nobody streams them, up to 32 at a time; one by one, or drawn at random, a token "
    "takes about a fifth longer, alone two fifths at most (docs/log.md, 2026-11-22)"
)
CAVEATS: Mapping[str, str] = {
    "serve.stream.vllm": _TOLD_TOGETHER + "; guesses gain less over HTTP (1.17 streamed, 1.20 as a whole) and in texts that "
    "repeat less than a small model's likeliest (docs/log.md, 2026-11-23); the promise is about engines as they come: with "
    "guesses on both sides, or on neither (serve.pass.vllm), it is missed on some days",
    "exact.prefill": _OUR_FAST_MODE,
    "exact.stream": _OUR_FAST_MODE,
    "exact.streams": _OUR_FAST_MODE,
    "exact.step": "in bf16 on a CPU fast runs the operators of exact; train.step has transformers",
    "serve.pass.vllm": _TOLD_TOGETHER
    + "; after 64 steps the weights are coded a second time, once, for a tenth of a second and three quarters of their memory; "
    "with the host's memory and vLLM's own rate the runs of one day went from 2.4 to 3.0 (docs/log.md, 2026-11-23)",
    "serve.streams16.vllm": _TOLD_TOGETHER,
    "serve.streams32.vllm": _TOLD_TOGETHER,
    "upcycle.sparse": "at equal time, which stands beside it, the dense model is better",
    "memory.seco": "with 2 of 4 heads for keys and values it holds more than StreamBP",
}
"""Claim -> what a reader must know beside its ratio and what a run of it found out."""


def caveat_of(claim: str, found: str) -> str:
    """What a reader must know beside a receipt, of which a run has `found` something, or nothing."""
    general = CAVEATS.get(claim, "")
    return found if general in found else "; ".join(filter(None, (found, general)))
