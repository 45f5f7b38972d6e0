"""All layers of a decoder in one call, for serving: the fused path, from outside.

What it computes is model/decoder.py, a layer after the other; what computes it is kernels/layers/layers.cpp, which does a
whole pass in one parallel region, where a small model would spend half of its time between operators. The bits are equal.

Takes it: layers with norms in front, softmax attention (grouped, windowed, with biases, with norms of heads), a dense gated
feed-forward, all of whose weights are packed, in 16, 8 or 4 bits; a pass over pages, without gradients. Everything else runs
an operator at a time, as it would without this file: `attach` then leaves the model alone, or the call returns None.

Shapes: T rows, C hidden_size, D head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from waypost.core.errors import ConfigError
from waypost.core.progress import say
from waypost.kernels import build
from waypost.kernels.greedy.cpu import Screen, fits, pays
from waypost.kernels.layers.ops import AtOnceOps, Guessing, Passed, Text
from waypost.kernels.layers.weights import LayerAdapters, LayerTable, LayerWeights, ModelEnds, Product
from waypost.kernels.linear.compact import Compact
from waypost.kernels.linear.cpu import Packed
from waypost.kernels.linear.packed import PackedLinear
from waypost.kernels.linear.quantized import QuantizedPanels
from waypost.kernels.ops import Pages
from waypost.kernels.vocabulary import WHOLE
from waypost.model.decoder import Decoder, Layer
from waypost.model.linear.dense import Linear
from waypost.model.linear.few_rows import FewRows
from waypost.model.linear.fused import FusedAttention, FusedFfn
from waypost.model.norm.rms import RmsNorm
from waypost.model.position.rope import angles
from waypost.model.rows import RowAdapters, Rows

# Asked of every parameter in every step; with map it takes a third of a comprehension's time.
_VERSION = attrgetter("_version")


def attach(model: Decoder) -> Decoder:
    """Lets `model`, which is fused and packed, run its layers at once where that is possible; in place. Done last."""
    if model.ops.at_once is not None and _weights(model) is not None:
        model.at_once = LayersAtOnce(model, model.ops.at_once)
    return model


class LayersAtOnce:
    """The layers of `model` as one call, following its parameters when they change in place."""

    def __init__(self, model: Decoder, ops: AtOnceOps) -> None:
        self._model = (model,)  # a tuple: a module would be registered nowhere, but be walked
        self._ops = ops
        self._parameters = list(model.parameters())
        self._seconds: Tensor | None = None
        self._sites = [site for layer in model.model.layers for site in _sites(layer)]
        self._adapters: tuple[Hashable, LayerAdapters] | None = None
        self._refresh()

    def __call__(self, h: Tensor, layers: Sequence[int], rows: Rows) -> Tensor | None:  # (T, C) -> (T, C)
        pages = self._pages(rows)
        return None if pages is None else self._ops.run_layers(self._table, layers, h, pages, *self._where(rows))

    def logits(self, rows: Rows, wanted: Tensor | None = None) -> Tensor | None:  # wanted (n,) -> (n, V)
        """From the embedding to the head in the same call; None where one of the two is something else."""
        pages = self._pages(rows)
        if pages is None or self._ends is None:
            return None
        self._layers.saw(rows.batch.num_tokens)
        self._head.saw(rows.batch.num_tokens if wanted is None else len(wanted))
        return self._ops.run_model(self._table, self._ends, rows.batch.tokens, wanted, pages, *self._where(rows))

    def largest(self, rows: Rows, wanted: Tensor | None = None) -> tuple[Tensor, Tensor] | None:  # wanted (n,) -> (n,), (n,)
        """LargestOp of `logits`, without computing most of them; None where that is not possible or would not pay."""
        pages = self._pages(rows)
        if pages is None:
            return None
        if self._screened is None:
            if self._ends is not None and self._ends.screen is not None:
                self._ends.screen.left_out()
            return None
        self._layers.saw(rows.batch.num_tokens)
        return self._ops.run_greedy(self._table, self._screened, rows.batch.tokens, wanted, pages, *self._where(rows))

    def passes(self, rows: Rows, texts: Sequence[Text], positions: Tensor, passes: int, guessing: Guessing) -> Passed | None:
        """RunPassesOp of `texts`, whose next positions are these (S, R); `rows` is the first pass without guesses, a row a
        sequence, without adapters."""
        pages = self._pages(rows)
        if pages is None or self._screened is None:
            return None
        self._layers.saw(len(texts), passes)
        angle = angles(self._model[0].config.rope, self._table.weights[0].width, positions.flatten())
        cos, sin = (x.view(*positions.shape, -1) for x in angle)
        context = rows.batch.context
        return self._ops.run_passes(self._table, self._screened, texts, pages, context, cos, sin, passes, guessing)

    @property
    def screened(self) -> bool:
        """Whether `largest` and `passes` are to be had."""
        return self._screened is not None

    @property
    def _screened(self) -> ModelEnds | None:
        """The ends, where their screen is there and helps. One whose kernel is still being compiled comes later."""
        if self._screen_later and not build.pending("greedy", "bf16"):
            self._refresh_ends()
        return self._ends if self._ends is not None and self._ends.screen is not None and self._ends.screen.helps else None

    def _pages(self, rows: Rows) -> Pages | None:
        """Where keys and values go, the table of weights brought up to date; None: the pass is not for this."""
        pages = rows.kv.pages
        if pages is None or torch.is_grad_enabled() or not rows.batch.num_tokens:
            return None
        if self._versions != list(map(_VERSION, self._parameters)):
            self._refresh()
        return pages

    def _where(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, LayerAdapters | None]:
        cos, sin = rows.angles(self._model[0].config.rope, self._table.weights[0].width)
        adapters = rows.adapters
        which, adapted = (None, None) if adapters is None else (adapters.which, self._adapted(adapters))
        return rows.batch.starts, rows.batch.context, cos, sin, which, adapted

    def weight_bytes(self, rows: int) -> int:
        """Bytes of weights that the layers read in a pass of so many rows, as they lie now."""
        return self._table.weight_bytes(rows)

    def time_into(self, seconds: Tensor | None) -> None:
        """From now on each pass adds to `seconds` (len(KINDS),) float64 what its kinds of work took (layers/weights.py)."""
        self._seconds = self._table.seconds = seconds

    def _adapted(self, adapters: RowAdapters) -> LayerAdapters:
        if self._adapters is None or self._adapters[0] != adapters.key:
            self._adapters = adapters.key, LayerAdapters([adapters.factors(site) for site in self._sites])
        return self._adapters[1]

    def _refresh(self) -> None:
        weights = _weights(self._model[0])
        assert weights is not None, "a model that could run at once can still do so"
        self._table = LayerTable(weights)
        self._table.seconds = self._seconds
        few = self._model[0].dtype == torch.bfloat16
        self._layers = FewRows(self._table.products if few else [], self._table.compact)
        self._refresh_ends()
        self._versions = list(map(_VERSION, self._parameters))

    def _refresh_ends(self) -> None:
        few = self._model[0].dtype == torch.bfloat16
        self._screen_later = build.pending("greedy", "bf16")
        self._ends = _ends(self._model[0], screen=not self._screen_later)
        self._head = FewRows([self._ends.head] if few and self._ends is not None else [], self._use_head)

    def _use_head(self, _: int, codes: Compact) -> None:
        assert self._ends is not None
        self._ends = replace(self._ends, head=replace(self._ends.head, compact=codes))


def _weights(model: Decoder) -> list[LayerWeights] | None:
    """What the kernel needs of every layer; None where one of them is something else."""
    linear = model.ops.linear
    if not isinstance(linear, PackedLinear) or model.dtype not in (torch.bfloat16, torch.float32):
        return None
    found: list[LayerWeights] = []
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        weights = _layer(layer, linear, model.dtype)
        if weights is None or weights.width != (found[0].width if found else weights.width):
            return None
        found.append(weights)
    return found


def _ends(model: Decoder, screen: bool) -> ModelEnds | None:
    """Embedding, last norm and head as the kernel takes them; None where one of them is something else, or elsewhere."""
    linear, embedding, norm = model.ops.linear, model.model.embed_tokens.weight, model.model.norm
    if type(norm) is not RmsNorm or model.ops.vocabulary is not WHOLE or model.model.embed_projection is not None:
        return None
    head = linear.product(model.output_weight) if isinstance(linear, PackedLinear) else None
    if head is None or embedding.is_meta or embedding.dtype != model.dtype or not embedding.is_contiguous():
        return None
    few = isinstance(head, QuantizedPanels)
    if head.inputs % 2 or (few and model.dtype != torch.bfloat16):
        return None
    weight = model.output_weight.detach()
    # A head of its own is there in panels alone, from which single outputs are slow to gather.
    screen = screen and isinstance(head, Packed) and model.lm_head is None
    return ModelEnds(
        embedding.detach(), norm.weight.detach(), norm.eps, Product(head, None), _screen(weight) if screen else None
    )


def _screen(weight: Tensor) -> Screen | None:
    """A screen where it is of use; a pass can do without, so a kernel that cannot be compiled now is no error."""
    try:
        return Screen(weight) if fits(weight) and pays(weight) else None
    except (ConfigError, OSError) as error:
        say(f"every request computes all logits from now on, for the kernel of greedy ones is not to be had: {error}")
        return None


def _layer(layer: Layer, linear: PackedLinear, dtype: torch.dtype) -> LayerWeights | None:
    attention, ffn = layer.self_attn, layer.mlp
    if layer.spec.norm != "pre" or type(attention) is not FusedAttention or type(ffn) is not FusedFfn:
        return None
    spec = attention.spec
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    if spec.qk_norm == "full" or any(norm is not None and type(norm) is not RmsNorm for norm in norms):
        return None
    groups = (attention.group.packed(), ffn.group.packed())
    if groups[0] is None or groups[1] is None:
        return None
    qkv, gate_up = (Product(*group) for group in groups if group is not None)
    out, down = _product(attention.o_proj, linear), _product(ffn.down_proj, linear)
    if out is None or down is None:
        return None
    if dtype != torch.bfloat16 and any(isinstance(p.weight, QuantizedPanels) for p in (qkv, gate_up, out, down)):
        return None
    vectors: list[Tensor] = [norm.weight for norm in norms if norm is not None]
    vectors += [p.bias for p in (qkv, gate_up, out, down) if p.bias is not None]
    uneven = any(p.weight.inputs % 2 for p in (qkv, gate_up, out, down))  # a pair of inputs more than a row has
    epsilons = {norm.eps for norm in norms if norm is not None}
    if uneven or len(epsilons) > 1 or any(v.dtype != dtype or not v.is_contiguous() for v in vectors):
        return None
    q_norm, k_norm = (None if norm is None else norm.weight.detach() for norm in norms[2:])
    return LayerWeights(
        layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach(), q_norm, k_norm,
        qkv, out, gate_up, down, spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, spec.window,
        spec.head_dim**-0.5, epsilons.pop(),
    )  # fmt: skip


def _sites(layer: nn.Module) -> list[Linear]:
    """The projections of a layer in the order of kernels/layers/weights.py."""
    attention, ffn = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    assert isinstance(attention, FusedAttention)
    assert isinstance(ffn, FusedFfn)
    return [*attention.group.parts, attention.o_proj, *ffn.group.parts, ffn.down_proj]


def _product(module: Linear, linear: PackedLinear) -> Product | None:
    packed = linear.product(module.weight) if type(module) is Linear else None
    return None if packed is None else Product(packed, None if module.bias is None else module.bias.detach())
