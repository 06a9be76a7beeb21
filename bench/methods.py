"""What is fine-tuned: how each library makes a model trainable, and how far the gradient then goes back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RANK = 8
LINEARS = ("query", "key", "value", "dense")
ADAPTER = "double_seq_bn"


@dataclass(frozen=True)
class Method:
    """A way of tuning; ``family`` is that of the kernels which it needs."""

    family: str
    words: str
    title: str
    library: str
    learning_rate: float
    tune: Callable[[nn.Module], nn.Module]
    """Freezes the model but its head, and adds what is trained."""
    gradient_ends: Callable[[str, nn.Module], bool]
    """By name: the modules into whose outputs, and no further, the gradient goes in the first layer."""


def freeze(model: nn.Module, method: Method) -> nn.Module:
    """All but the head, and lets the gradient go back as far as the method lets it.

    What is added behind a module of the first layer makes its output require a gradient, but not
    its input; so does the hook.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.classifier.requires_grad_(True)

    def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    for name, module in model.named_modules():
        if method.gradient_ends(name, module):
            module.register_forward_hook(require_grad)
    return model


def _with_lora(model: nn.Module) -> nn.Module:
    """PEFT as it comes: over a half-precision model its adapters are fp32."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=list(LINEARS),
    )
    return get_peft_model(model, config)


def _with_adapters(model: nn.Module) -> nn.Module:
    """The adapters library as it comes: Houlsby's configuration, in the model's dtype."""
    import adapters

    # between `init` and `add_adapter` it says that no adapter is active, for every model
    logging.getLogger("adapters").setLevel(logging.ERROR)
    dtype = next(model.parameters()).dtype
    adapters.init(model)
    model.add_adapter("reviews", config=ADAPTER)  # type: ignore[operator]
    model.train_adapter("reviews")  # type: ignore[operator]
    return model.to(dtype)


METHODS = {
    method.family: method
    for method in (
        Method(
            "lora",
            "LoRA by PEFT",
            f"LoRA r = {RANK} on every linear",
            "PEFT",
            2e-3,
            _with_lora,
            lambda name, module: (
                isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS
            ),
        ),
        Method(
            "adapter",
            "Adapters by AdapterHub",
            f"two bottleneck adapters in each layer ({ADAPTER})",
            "the adapters library",
            3e-3,
            _with_adapters,
            lambda name, module: name.endswith("attention.output.dense"),
        ),
    )
}
