"""One call that makes an existing model fast, and one that undoes it."""

from __future__ import annotations

import sys

from torch import nn

from .report import Report

__all__ = ["Report", "accelerate", "restore"]


def accelerate(model: nn.Module) -> Report:
    """Makes the LoRA layers of a PEFT model fast, in place.

    Every ``peft.tuners.lora.Linear`` over a plain ``nn.Linear`` or ``Conv1D`` computes with
    ``pelt_fast.functional.lora_linear`` from then on. The layers stay the same objects, with the
    same parameters, ``state_dict`` keys and saved files. Scalings, active adapters, merging,
    disabling, dropout and training mode are read at each call, so PEFT's own methods go on working.
    Where a call is not served (merged, disabled, ``adapter_names``, DoRA and other variants, hooks
    on the inner layers, mixed dtypes), PEFT's own forward runs.

    Dropout draws from another random stream than PEFT's: equal in distribution, not mask by mask.
    A double backward through an accelerated layer raises an error.

    Calling it again is harmless, and needed only for layers that PEFT created since: an adapter
    that is added to a layer already accelerated is served at once. What ``save_pretrained`` writes
    does not change; a whole model that is pickled while accelerated needs pelt_fast to load.

    Args:
        model: a ``PeftModel``, or any module with injected PEFT LoRA layers.

    Returns:
        What was replaced, and what was not, and why; ``print`` it.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or is a model of the ``adapters`` library.
        ValueError: there is no PEFT layer in ``model``.
    """
    _check_module(model)
    # a model can hold PEFT's layers only if somebody has imported PEFT
    if "peft" in sys.modules:
        from . import peft

        if peft.has_layers(model):
            return peft.accelerate(model)
    if "adapters" in sys.modules and _has_module_of(model, "adapters"):
        raise TypeError(
            f"model is a {type(model).__name__} of the adapters library, which is not served; "
            "expected a PEFT model with LoRA layers"
        )
    raise ValueError(
        f"model ({type(model).__name__}) has no PEFT layer, so there is nothing to accelerate; "
        "expected a model after peft.get_peft_model, PeftModel.from_pretrained or add_adapter"
    )


def restore(model: nn.Module) -> int:
    """Undoes ``accelerate``: every layer has its former class and ``__dict__`` again.

    Args:
        model: the accelerated model; one that never was is left as it is.

    Returns:
        How many layers were restored.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        RuntimeError: another library has since put its own class over an accelerated layer, as
            FSDP2 does. Nothing is changed then.
    """
    _check_module(model)
    if "peft" not in sys.modules:
        return 0
    from . import peft

    return peft.restore(model)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")


def _has_module_of(model: nn.Module, package: str) -> bool:
    """Whether any module of the model is of a class that the package defines."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    return any(base.__module__.partition(".")[0] == package for base in classes)
