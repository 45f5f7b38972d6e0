"""tensor: every matrix of a layer is split over the ranks, which compute the same rows together.

Source    Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, sec. 3; with data parallelism around it: Narayanan et al.
          2021, arXiv:2104.04473 (sec. 3.2)
Equation  q, k, v, gate, up split by outputs, o and down by inputs: y = sum over ranks of W_r x_r. A micro-batch of T rows,
          n of them with a weight, all-reduces for L dense layers s ((4 L + 1) T C + n C) + 12 n bytes a rank (s bytes a
          number): per layer two sums forward and two backward, the embedding, the head's gradient, three numbers a loss;
          `message_bytes` has it for norms of heads and mixtures too. Around it, what fsdp gathers and reduces
Shapes    a matrix (N, K) becomes (N / ranks, K) or (N, K / ranks); embedding and head (V / ranks, C); activations whole
Acts on   the model; ranks beyond `ranks` share out the rows, and each part is sharded over those as by fsdp
Differs   norms compute whole rows on every rank (no sequence parallelism); cross entropy adds max, sum and target logit
          over the ranks. An expert of a mixture is split too, with sums of its own: choose `expert` for those
Exact     one rank is `single` to the bit; else a float32 gradient is one rank's to 1e-5 of each parameter's norm, a bf16 one
          to 3e-2 of the whole norm, as far as one rank's is from float32's; rows near a tie may choose another expert in bf16
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from waypost.core.config import cost, technique
from waypost.core.errors import ConfigError
from waypost.model.config import ModelConfig
from waypost.model.decoder import Decoder
from waypost.model.ffn.dense import DenseFfn
from waypost.model.mixer.attention import AttentionMixer
from waypost.train.parallel._split import need_whole_weights, split_ops
from waypost.train.parallel.fsdp import Fsdp, shard_model
from waypost.train.parallel.world import Share, World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

OUTPUTS, INPUTS, EACH = Shard(0), Shard(1), Replicate()
ATTENTION: dict[str, Placement] = {"q_proj": OUTPUTS, "k_proj": OUTPUTS, "v_proj": OUTPUTS, "o_proj": INPUTS}
DENSE: dict[str, Placement] = {"gate_proj": OUTPUTS, "up_proj": OUTPUTS, "down_proj": INPUTS}
VOCABULARY: dict[str, Placement] = {"embed_tokens": OUTPUTS, "lm_head": OUTPUTS}


def placements(model: Decoder) -> dict[str, Placement]:
    """Parameter name -> how it is split; a name that is not here lies whole on every rank."""
    found: dict[str, Placement] = {}
    for prefix, module in model.named_modules():
        plan = ATTENTION if isinstance(module, AttentionMixer) else DENSE if isinstance(module, DenseFfn) else VOCABULARY
        for part, placement in plan.items():
            linear = getattr(module, part, None)
            if linear is not None:
                name = f"{prefix}.{part}".lstrip(".")
                found[f"{name}.weight"] = placement
                if placement == OUTPUTS and getattr(linear, "bias", None) is not None:
                    found[f"{name}.bias"] = placement
        if isinstance(module, AttentionMixer) and module.spec.qk_norm == "head":
            found |= {f"{prefix}.q_norm.weight": EACH, f"{prefix}.k_norm.weight": EACH}
    return found


def check(config: ModelConfig, ranks: int) -> None:
    """ConfigError where a dimension that is split does not come out even."""

    def even(count: int, what: str) -> None:
        if count % ranks:
            raise ConfigError(
                f"parallel.tensor: {count} {what} do not divide among {ranks} ranks; give parallel.ranks a divisor of "
                f"{count}, so that the others share out the rows, or choose fsdp"
            )

    even(config.vocab_size, "rows of the vocabulary (vocab_size)")
    for spec in config.layers:
        for field, what in (("num_attention_heads", "query heads"), ("num_key_value_heads", "key/value heads")):
            even(getattr(spec.mixer, field), f"{what} ({field})")
        for field in ("intermediate_size", "shared_intermediate_size"):
            even(getattr(spec.ffn, field, None) or 0, f"channels of the feed-forward ({field})")
        if spec.mixer.qk_norm == "full" and ranks > 1:
            raise ConfigError("parallel.tensor: this model norms queries and keys over all heads at once (qk_norm: full), "
                              "which no rank holds; choose fsdp")  # fmt: skip


def message_bytes(config: ModelConfig, rows: int, learned: int, item: int) -> int:
    """Bytes that a rank all-reduces for a micro-batch of `rows` rows, `learned` of them with a weight, forward and backward;
    `item` bytes a number. A mixture adds up every expert's rows, and the shared expert's, by themselves."""
    sums = heads = 0
    for spec in config.layers:
        mixture = getattr(spec.ffn, "num_experts_per_tok", 1) + (
            getattr(spec.ffn, "shared_intermediate_size", None) is not None
        )
        sums += 2 + 2 * mixture
        heads += 2 * spec.mixer.head_dim * (spec.mixer.qk_norm == "head")
    return item * config.hidden_size * ((sums + 1) * rows + learned) + 12 * learned + 4 * heads


def split_model(model: Decoder, mesh: DeviceMesh) -> None:
    """Leaves this rank its part of every matrix of `placements`, over the ranks of `mesh`, and operators that add parts up."""
    for name, placement in placements(model).items():
        module, _, field = name.rpartition(".")
        owner = model.get_submodule(module)
        part = distribute_tensor(owner.get_parameter(field).detach(), mesh, [placement], src_data_rank=None)
        setattr(owner, field, nn.Parameter(part))
    model.ops = split_ops(model.ops, mesh.get_group())


@technique
class Tensor:
    ranks: int | None = cost(None)
    """Ranks that split each layer, neighbours in torchrun's order; null: all. The others share out the rows, as fsdp."""
    reshard_after_forward: bool = cost(True)
    """As in fsdp, where there are such others."""

    def apply(self, model: Decoder, world: World) -> None:
        ranks = world.groups("parallel", self.ranks)
        check(model.config, ranks)
        if ranks == 1:
            return Fsdp(reshard_after_forward=self.reshard_after_forward).apply(model, world)
        need_whole_weights(model, "tensor")
        mesh = world.mesh(data=world.size // ranks, tensor=ranks)
        split_model(model, mesh["tensor"])
        if ranks < world.size:
            shard_model(model, mesh["data"], self.reshard_after_forward)
        return None

    def share(self, world: World) -> Share:
        ranks = world.groups("parallel", self.ranks)
        return Share(world.rank // ranks, world.size // ranks, world.rank % ranks == 0)

    def begin(self, model: Decoder, micro_batches: int) -> None:
        Fsdp().begin(model, micro_batches)

    def micro_batch(self, model: Decoder, last: bool) -> None:
        Fsdp().micro_batch(model, last)

    def settle(self, model: Decoder) -> None:
        Fsdp().settle(model)
