"""An adapter's files, as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

What cannot be honoured exactly (other methods than LoRA, biases, DoRA, whole modules trained beside, scalings by module) is
refused with its name; dropout is of training alone and is read past.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from waypost.core.errors import CheckpointError
from waypost.model.adapter_names import FOLDER, PREFIX
from waypost.model.adapters.lora import scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ABSENT = (
    "alpha_pattern", "modules_to_save", "use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora",
)  # fmt: skip
"""Fields that must say nothing: each of them makes another function."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA adapter: for each projection A (r, K), B (N, r) and the factor of their product. Ranks may differ."""

    path: Path
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Projection, e.g. "model.layers.0.self_attn.q_proj" -> (A, B), float32."""
    scales: Mapping[str, float]
    config: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())


def folder_of(path: str | Path) -> Path:
    """The folder of the adapter's files: `path` itself, or the one within a checkpoint or a run's newest checkpoint."""
    path = Path(path)
    for folder in (path, path / FOLDER):
        if (folder / CONFIG).is_file():
            return folder
    if (path / "latest").is_file():
        from waypost.keep.reader import Checkpoint

        inner = Path(Checkpoint(path).path) / FOLDER
        if (inner / CONFIG).is_file():
            return inner
    why = f"({CONFIG} and {WEIGHTS}), nor does a folder '{FOLDER}' in it" if path.exists() else "as there is no such folder"
    raise CheckpointError(f"{path}: holds no adapter {why}; give a folder that PEFT wrote, or a checkpoint or run of one")


def read(path: str | Path) -> LoraFile:
    """The adapter of `folder_of(path)`, in memory. CheckpointError for what is damaged or cannot be honoured exactly."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = folder_of(path)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its adapter cannot be read ({error}); copy both of its files again") from error
    _check_config(folder, config)
    pairs = {site: _pair(folder, stored, site) for site in dict.fromkeys(map(_site(folder), stored))}
    alpha, rslora = float(config.get("lora_alpha", 8)), bool(config.get("use_rslora", False))
    return LoraFile(folder, pairs, {site: scaling(len(a), alpha, rslora) for site, (a, _) in pairs.items()}, config)


def _check_config(folder: Path, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {kind!r}; only LORA can be read here")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{folder / CONFIG}: bias is '{config['bias']}'; adapters that train biases cannot be used here")
    for name in ABSENT:
        if config.get(name):
            raise CheckpointError(f"{folder / CONFIG}: {name} is {config[name]!r}, which cannot be honoured here; merge the "
                                  "adapter with PEFT and use the merged model")  # fmt: skip


def _site(folder: Path) -> Any:
    def site(name: str) -> str:
        core, found = name.removeprefix(PREFIX), name.startswith(PREFIX)
        for tail in (".lora_A.weight", ".lora_B.weight"):
            if found and core.endswith(tail):
                return core.removesuffix(tail)
        raise CheckpointError(f"{folder / WEIGHTS}: '{name}' is no LoRA matrix of a projection, and cannot be used here")

    return site


def _pair(folder: Path, stored: Mapping[str, Tensor], site: str) -> tuple[Tensor, Tensor]:
    pair = [stored.get(f"{PREFIX}{site}.lora_{side}.weight") for side in "AB"]
    a, b = pair
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        shapes = ["absent" if x is None else str(list(x.shape)) for x in pair]
        raise CheckpointError(f"{folder / WEIGHTS}: of {site}, A is {shapes[0]} and B {shapes[1]}; they must be (r, K), (N, r)")
    return a.float().contiguous(), b.float().contiguous()


def write(folder: str | Path, adapter: LoraFile) -> Path:
    """Writes `adapter` into `folder`, which is made."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{site}.lora_{s}.weight": x for site, pair in adapter.pairs.items() for s, x in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(adapter.config), indent=2) + "\n", encoding="utf-8")
    return folder
