"""The models of conftest.py with bottleneck adapters, whose parameters are all drawn at random.

The library starts an adapter near the identity, which hides errors: here it adds about as much as
the layer has, and the layernorms around it are no longer ones and zeros.
"""

from __future__ import annotations

import math
from typing import Any

import adapters
import torch
from adapters.methods.bottleneck import BottleneckLayer
from torch import nn

from .conftest import ARCHITECTURES

# bottleneck layers of the models: two in each block, three in T5's decoder
LAYERS = {"bert": 4, "roberta": 4, "t5": 10, "gpt2": 4, "llama": 4, "qwen2": 4}

HOULSBY = adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu", cross_adapter=True)


def is_adapter(name: str) -> bool:
    return any(
        part in name for part in (".adapters.", "shared_parameters.", "invertible_adapters.")
    )


def is_norm(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name


def randomize(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (is_adapter(name) or is_norm(name)):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            elif name.endswith("scaling") or (is_norm(name) and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)


def plain_model(architecture: str = "bert", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture].build().to(dtype)
    # a cache is off under checkpointing, and T5 rounds otherwise
    model.config.use_cache = False
    adapters.init(model)
    return model


def adapted(
    architecture: str = "bert",
    *configs: Any,
    dtype: torch.dtype = torch.float32,
    adapters_fp32: bool = False,
) -> nn.Module:
    """A model with the adapters "a", "b", ... of these configs, "a" active and in training.

    Trained are its adapters, the layernorms, and the token embeddings: a gradient reaches them only
    through every layer.
    """
    model = plain_model(architecture, dtype)
    names = [chr(ord("a") + i) for i in range(max(1, len(configs)))]
    for name, config in zip(names, configs or (HOULSBY,), strict=True):
        model.add_adapter(name, config=config)
    model.train_adapter("a")
    randomize(model)
    for name, parameter in model.named_parameters():
        if is_norm(name) or parameter is model.get_input_embeddings().weight:
            parameter.requires_grad_(True)
        if is_adapter(name) and not adapters_fp32:
            parameter.data = parameter.data.to(dtype)
    return model


def bottleneck_layers(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]
