"""What the methods train, and at which rate; as the `adapters` library has them, fine-tuning and BitFit without it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .material import SOURCES

OWN = "task"
"""The adapter of the task itself; of fusion the first."""
LENGTH, REDUCTION, RANK, ALPHA = 10, 16, 8, 2


@dataclass(frozen=True)
class Method:
    """``rate`` is the paper's; of fusion, that of AdapterFusion's second stage."""

    name: str
    title: str
    rate: float
    tune: Callable[[Any], None]
    """Freezes the model but its head and what the method trains, which it adds."""
    in_library: bool = True
    """Whether its layers are the `adapters` library's: of the others there is nothing to accelerate."""


def _everything(model: Any) -> None:
    model.requires_grad_(True)


def _biases(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier") or name.endswith(".bias"))


def _added(config: Callable[[], Any]) -> Callable[[Any], None]:
    def tune(model: Any) -> None:
        _init(model)
        model.add_adapter(OWN, config=config())
        model.train_adapter(OWN)

    return tune


def _fused(model: Any) -> None:
    from adapters.composition import Fuse

    _init(model)
    names = (OWN, *SOURCES)
    for name in names:
        model.add_adapter(name, config=_adapter())
    model.add_adapter_fusion(Fuse(*names))
    model.train_adapter_fusion(Fuse(*names))


def _init(model: Any) -> None:
    import adapters

    # between `init` and `add_adapter` it says that no adapter is active, for every model
    logging.getLogger("adapters").setLevel(logging.ERROR)
    adapters.init(model)


def _adapter() -> Any:
    from adapters import SeqBnConfig

    return SeqBnConfig(reduction_factor=REDUCTION)


def _prefix() -> Any:
    from adapters import PrefixTuningConfig

    return PrefixTuningConfig(prefix_length=LENGTH)


def _lora() -> Any:
    from adapters import LoRAConfig

    return LoRAConfig(r=RANK, alpha=ALPHA)


def _unipelt() -> Any:
    from adapters import UniPELTConfig

    return UniPELTConfig(_prefix(), _adapter(), _lora())


FINE_TUNING = "fine-tuning"
METHODS = {
    method.name: method
    for method in (
        Method(FINE_TUNING, "Fine-tuning", 2e-5, _everything, in_library=False),
        Method("bitfit", "BitFit", 1e-4, _biases, in_library=False),
        Method("adapter", "Adapter", 1e-4, _added(_adapter)),
        Method("prefix", "Prefix tuning", 2e-4, _added(_prefix)),
        Method("lora", "LoRA", 5e-4, _added(_lora)),
        Method("unipelt", "UniPELT (APL)", 5e-4, _added(_unipelt)),
        Method("fusion", f"AdapterFusion, N = {1 + len(SOURCES)}", 5e-5, _fused),
    )
}


def regularizer(model: Any) -> Tensor | None:
    """Of fusion's value projections, as the library's trainer adds it to the loss."""
    of_fusion = getattr(model, "get_fusion_regularization_loss", None)
    loss: Tensor | None = of_fusion() if of_fusion and model.adapters_config.fusions else None
    return loss


@dataclass(frozen=True)
class Trained:
    """Parameters that a method trains, without the head's; ``ejected``: the prefix stored as what its MLP gives."""

    total: int
    ejected: int


def trained(model: Any) -> Trained:
    total = _count(model)
    if not hasattr(model, "adapters_config"):
        return Trained(total, total)
    flat = copy.deepcopy(model)
    flat.eject_prefix_tuning(OWN)
    return Trained(total, _count(flat))


def _count(model: nn.Module) -> int:
    found = model.named_parameters()
    return sum(
        p.numel() for name, p in found if p.requires_grad and not name.startswith("classifier")
    )
