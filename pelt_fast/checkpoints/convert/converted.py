"""A converted checkpoint, and its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMATS = ("adapters", "peft", "opendelta")
_FILES = {
    "adapters": ("adapter_config.json", "pytorch_adapter.bin"),
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "opendelta": ("config.json", "pytorch_model.bin"),
}


@dataclass(frozen=True)
class Converted:
    """Tensors by name and the config of one library.

    ``others`` is what an OpenDelta checkpoint trained beside its deltas (layernorms, heads) under the names of the
    model's ``state_dict``: the formats of the other libraries have no place for it.
    """

    format: str
    state: dict[str, Tensor]
    config: Mapping[str, Any]
    others: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the two files that the library reads; the folder is made where it is not there."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config, weights = _FILES[self.format]
        # memory of its own for each: several names may share a tensor
        state = {key: t.clone().contiguous() for key, t in self.state.items()}
        if weights.endswith(".safetensors"):
            from safetensors.torch import save_file

            save_file(state, path / weights, metadata={"format": "pt"})
        else:
            torch.save(state, path / weights)
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (path / config).write_text(text + "\n", encoding="utf-8")
        return path
