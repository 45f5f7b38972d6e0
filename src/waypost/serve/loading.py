"""What happens before the first request: the model, the room for its pages, and the proof of the numeric contract."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from waypost.core.errors import CapacityError, ConfigError, NumericsError, counted
from waypost.core.progress import say
from waypost.keep import image
from waypost.kernels.call import WIDE
from waypost.kernels.choose import select
from waypost.kernels.linear.packed import PackedLinear
from waypost.kernels.linear.rows import differing_count, trial_input
from waypost.kernels.ops import Kernel, Numerics, Ops
from waypost.model.config import ModelConfig
from waypost.model.decoder import Decoder
from waypost.model.linear import quantized
from waypost.model.linear.at_once import attach
from waypost.model.linear.dense import Linear
from waypost.model.linear.fused import FusedAttention, FusedFfn, fuse, stored_as
from waypost.model.linear.int8 import Int8Linear
from waypost.model.linear.layercast import widen_arithmetic
from waypost.model.norm.projected import Projection
from waypost.model.tokenizer import Tokenizer, check_fits
from waypost.serve.ahead import Ahead
from waypost.serve.pages import PagedKv, pages_for
from waypost.serve.request import TextTokenizer

CACHE_SHARE = 0.25
"""Share of the memory at hand that the cache takes at most when num_pages is not given."""

TRIED_ROWS = (3, 9, 16, 35)
"""Row counts for which a product is compared with all rows at once; each is padded to another number of tiles."""

Shape = tuple[int, int, torch.dtype, type, tuple[int, int] | None, bool]
"""(inputs, outputs, dtype, class of the module, bits and group size of a weight in few bits, whether there is a bias) of a
product: what chooses its code."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to serve: weights packed for their kernels, and the ids that end a text."""

    model: Decoder
    tokenizer: TextTokenizer | None
    eos_ids: list[int]
    plain_ops: Ops
    """The operators before the weights were packed."""


def load(
    path: str | Path | Ahead, numerics: Numerics, kernel: Kernel, dtype: torch.dtype | None,
    arithmetic: torch.dtype | None = None,
) -> Loaded:  # fmt: skip
    """A checkpoint ready to serve: memory-mapped, projections fused, with its tokenizer if it has one."""
    ahead = path if isinstance(path, Ahead) else Ahead(path)
    opened = ahead.checkpoint()
    folder = Path(opened.path)
    if any(role == "adapter" for role, _ in opened.specs):
        say(f"{folder}: holds an adapter beside the model, and the model is loaded without it; --lora lets it answer (waypost "
            "serve: --lora NAME=FOLDER), and recipes/lora-merge.yaml merges it into the weights")  # fmt: skip
    plain_ops = select(numerics, kernel)
    if kernel == "auto" and plain_ops.name == "naive":
        say("no C++ compiler is at hand, so plain PyTorch kernels run, several times slower: install g++ (or say kernel naive)")
    with ThreadPoolExecutor(1, "waypost-tokenizer") as beside:  # read while kernels check and pack the weights
        reading = beside.submit(_read_tokenizer, folder) if (folder / "tokenizer.json").exists() else None
        model = quantized.load(opened, dtype, plain_ops, packed=arithmetic is None, verify=False)
        if arithmetic is not None:
            widen_arithmetic(model, arithmetic)
        _check_dtype(model, folder)
        prepare_for_serving(model)
        tokenizer = None if reading is None else reading.result()
    if tokenizer is not None:
        check_fits(tokenizer, model.config)
    return Loaded(model, tokenizer, generation_eos(folder), plain_ops)


def _check_dtype(model: Decoder, folder: Path) -> None:
    """ConfigError for a dtype that the model's operators do not compute in, before any request meets it."""
    if model.ops.compiled and model.dtype not in WIDE:
        name = str(model.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{folder}: {name} is not computed by the compiled kernels; choose bfloat16 or float32 as its dtype, or the plain "
            "kernels (kernel naive)"
        )


def _read_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    _ = tokenizer.vocab_size  # looks at every token, once: `check_fits` asks for it
    return tokenizer


def generation_eos(folder: Path) -> list[int]:
    """End tokens that generation_config.json names beside those of config.json."""
    path = folder / "generation_config.json"
    if not path.exists():
        return []
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not a JSON object ({error}); repair or remove it") from error
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(each) is int for each in ids):
        raise ConfigError(f"{path}: eos_token_id={eos!r}: must be a token id or a list of them; repair or remove it")
    return ids


def context_length(config: ModelConfig, asked: int | None) -> int:
    """Positions a request may have: `asked`, or all that the model was made for."""
    if asked is None:
        return config.max_position_embeddings
    if not 2 <= asked <= config.max_position_embeddings:
        raise ConfigError(f"max_seq_len={asked}: must be in 2..{config.max_position_embeddings}, the model's context")
    return asked


def num_pages(config: ModelConfig, dtype: torch.dtype, max_seq_len: int, max_sequences: int) -> int:
    """Pages for `max_sequences` full contexts, or as many as CACHE_SHARE of the free memory holds."""
    budget = int(CACHE_SHARE * available_bytes()) // PagedKv.page_bytes(config, dtype)
    if budget < 1:
        raise CapacityError(
            f"no memory for a page of {PagedKv.page_bytes(config, dtype)} bytes; free some, or use a smaller dtype"
        )
    return min(budget, max_sequences * pages_for(max_seq_len))


def available_bytes() -> int:
    """Memory that can be taken without swapping, as Linux estimates it; elsewhere half of what is installed."""
    known = image.available_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if known is None else known


def prepare_for_serving(model: Decoder) -> Decoder:
    """Fuses projections of one input and, on the compiled kernels, packs the weights and runs all layers in one call where
    that is possible; in place. The bits stay."""
    if not model.ops.compiled:
        return fuse(model)
    given = model.ops.linear
    packed = given if isinstance(given, PackedLinear) else PackedLinear(given)
    model.ops = replace(model.ops, linear=packed)
    fuse(model)
    for _, module in _plain_linears(model):
        if not isinstance(module, Int8Linear):
            packed.hold(module.weight)
    if model.lm_head is None:
        packed.hold(model.output_weight)
    return attach(model)


@torch.no_grad()
def check_numerics(model: Decoder) -> None:
    """Proves on this machine, at this number of threads, that a row of each of the model's linear shapes does not depend
    on the rows beside it. Raises NumericsError naming the first shape for which it does."""
    seen: set[Shape] = set()
    for name, product, weight, shape in _products(model):
        if shape in seen:
            continue
        seen.add(shape)
        inputs, outputs = shape[:2]
        x = trial_input(inputs, outputs, model.dtype)
        count = differing_count(product, x, product(x), [n for n in TRIED_ROWS if n < len(x)])
        if count is not None:
            raise NumericsError(
                f"numerics='exact' does not hold here: with {counted(torch.get_num_threads(), 'thread')} the bits of "
                f"a row of {name}, "
                f"{inputs} -> {outputs} in {weight.dtype}, are others among {count} rows than among {len(x)}; "
                "choose another kernel, another number of threads, or numerics='fast'"
            )


def _plain_linears(model: Decoder) -> Iterator[tuple[str, Linear | Projection]]:
    """The linears of `model` that no fused group took over, its projections among them."""
    fused: set[nn.Module] = set()  # parents come before their children
    for name, module in model.named_modules():
        if isinstance(module, FusedAttention | FusedFfn):
            fused.update(module.group.parts)
        elif isinstance(module, Linear | Projection) and module not in fused:
            yield name, module


def _products(model: Decoder) -> Iterator[tuple[str, Callable[[Tensor], Tensor], Tensor, Shape]]:
    """(name, the product, a weight of it, what tells its shape) of every linear as the model calls it."""
    linear = model.ops.linear

    def shape(module: type, weight: Tensor, outputs: int, bias: Tensor | None) -> Shape:
        return weight.shape[1], outputs, weight.dtype, module, stored_as(weight, linear), bias is not None

    for name, module in model.named_modules():
        if isinstance(module, FusedAttention | FusedFfn):
            first, outputs = module.group.parts[0], sum(module.group.widths)
            yield name, module.group, first.weight, shape(type(module), first.weight, outputs, first.bias)
    for name, plain in _plain_linears(model):
        call = functools.partial(plain.product, ops=model.ops)
        yield name, call, plain.weight, shape(type(plain), plain.weight, plain.weight.shape[0], plain.bias)
    head = model.output_weight
    yield "the output head", functools.partial(linear, weight=head), head, shape(Linear, head, head.shape[0], None)
