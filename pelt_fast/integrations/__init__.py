"""One call that makes an existing model fast, and one that undoes it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from .report import Report

__all__ = ["Report", "accelerate", "mixed_batch", "restore"]

# modules of this package, and where the layers that they serve are defined: a model can have such a
# layer only if somebody has imported that
_LIBRARIES = {"peft": "peft.tuners.tuners_utils", "adapters": "adapters.methods.bottleneck"}


def accelerate(model: nn.Module, *, compat: str | None = None) -> Report:
    """Makes the adapters of a PEFT or `adapters` model fast, in place.

    In a PEFT model every ``peft.tuners.lora.Linear`` over a plain ``nn.Linear`` or ``Conv1D`` computes
    with ``pelt_fast.functional.lora_linear`` from then on, and with ``multi_lora_linear`` where each sample of a
    batch names its adapter: ``model(..., adapter_names=["a", "b", "__base__"])``, and likewise ``generate``.
    Such a batch also trains, which it does not in PEFT: make the adapters trainable by
    ``model.set_requires_grad(["a", "b"])``, and accelerate the ``PeftModel`` itself, not a part of it. If the
    model has other PEFT modules (embeddings, ``modules_to_save``), training raises PEFT's error. In eval
    the adapters of the batch are stacked once and again when they change; on a GPU a write through
    ``parameter.data`` in place is not noticed. The MLP of a prefix (``PrefixTuningConfig`` with
    ``prefix_projection``) runs once for all samples. In a model of the `adapters` library every
    bottleneck layer computes with ``pelt_fast.functional.bottleneck_adapter``: one adapter together
    with the residuals and the layernorm around it, several of a composition (``Stack``, ``Split``,
    ``Parallel``, ``BatchSplit``, ``Average``) one by one, a ``Fuse`` of plain adapters in
    one call; Compacter's, whose projections are Kronecker products, with ``compacter``; and an
    invertible adapter (NICE) is two such calls; a linear layer with one LoRA computes with
    ``lora_linear``, or with ``gated_lora_linear`` where it has UniPELT's gate. A model with layers of
    both libraries has both.

    The base model's ``nn.Linear`` layers whose weights are frozen compute with ``frozen_linear``, also below a LoRA
    that is disabled, and its dropouts draw torch's masks faster; in a model of `adapters`, of the layers that
    transformers or the library defines. A weight that trains is torch's to multiply with, now or later. PEFT's
    ``unload`` and ``merge_and_unload`` give the base model back without any of this.

    The layers stay the same objects, with the same parameters, ``state_dict`` keys and saved files.
    Scalings, active adapters, setups, merging, disabling, dropout and training mode are read at each
    call, so the libraries' own methods go on working. Where a call is not served, the library's own
    forward runs: in PEFT for merged or disabled adapters, DoRA and other variants, and mixed batches of
    unequal dropout;
    in `adapters` for activations that kernels do not have, and when gating scores
    are wanted; in both for hooks on inner layers and mixed dtypes.

    The float32 adapters that the `adapters` library adds to a bfloat16 or float16 model need no cast.
    Dropout draws from another random stream than the libraries': equal in distribution, not mask by
    mask. A double backward through an accelerated layer raises an error.

    Calling it again is harmless, and needed only for layers that PEFT created since: an adapter
    that is added to a layer already accelerated is served at once. What ``save_pretrained`` and
    ``save_adapter`` write does not change; a module that is pickled while accelerated needs pelt_fast
    to load.

    Args:
        model: a ``PeftModel``, a model after ``adapters.init``, an ``AdapterModel``, or any module
            with layers of these libraries in it.
        compat: whose semantics the gates of UniPELT have in layers of the `adapters` library. "adapters": the
            library's, a mean over all tokens, padding included, in place of a LoRA's alpha / r. "paper": the mean over
            the real tokens of the attention mask, and alpha / r too; a call that only the library can serve raises
            then. None: what an earlier call said, else "adapters".

    Returns:
        What was made fast, of each sort how many, and what was not, and why; ``print`` it.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: there is no layer of either library in ``model``; ``compat`` is another; it is "paper", and the
            model has no layer of `adapters`, no attention mask for its gates (encoders with decoders, vision), or
            gates on layers that are left to the library. Nothing is changed then.
    """
    _check_module(model)
    if compat not in (None, "adapters", "paper"):
        raise ValueError(f"compat is {compat!r}; expected 'adapters', 'paper' or None")
    found = [library for library in _imported() if library.has_layers(model)]
    if not found:
        raise ValueError(
            f"model ({type(model).__name__}) has no PEFT layer and none of the adapters library, so there "
            "is nothing to accelerate; expected a model after peft.get_peft_model, "
            "PeftModel.from_pretrained, add_adapter or adapters.init"
        )
    if compat == "paper" and not any(library.__name__.endswith(".adapters") for library in found):
        raise ValueError(
            "compat is 'paper', and model has no layer of the adapters library, whose gates it is about"
        )
    # adapters first, which may refuse
    reports: list[Report] = [library.accelerate(model, compat) for library in reversed(found)]
    return functools.reduce(operator.or_, reversed(reports))


def restore(model: nn.Module) -> int:
    """Undoes ``accelerate``: every layer has its former class and ``__dict__`` again.

    Args:
        model: the accelerated model; one that never was is left as it is.

    Returns:
        How many layers with adapters were restored; those of the base model are not counted.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        RuntimeError: another library has since put its own class over an accelerated layer, as
            FSDP2 does. Nothing is changed then.
    """
    _check_module(model)
    layers = [(library, library.accelerated_layers(model)) for library in _imported()]
    for library, accelerated in layers:
        library.restore(accelerated)
    return sum(len(accelerated) for _, accelerated in layers)


def mixed_batch(model: nn.Module, setups: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Within the block each sample of an accelerated `adapters` model has a setup of its own, of any method.

    ``with pelt_fast.mixed_batch(model, ["lora", Fuse("a", "b"), "unipelt", None]): loss = model(**batch).loss``, and
    ``loss.backward()`` inside or outside of the block, gives each sample what ``set_active_adapters(setup)`` gives it
    alone, at the same padded length: LoRA, bottleneck adapters of all forms (Compacter and parallel ones too),
    fusion, prefixes of any lengths, invertible adapters, unions of them (UniPELT, MAM) and none, in any order, each
    setup as often as one likes. LoRA of all samples is one ``multi_lora_linear``; other layers compute the samples
    setup by setup. Dropout acts on each sample as alone, with other draws. An adapter that no sample names gets no
    gradient (None, not zeros). What trains is what requires a gradient: ``model.train_adapter(Stack("a", "b"))`` makes
    several adapters train at once.

    Nothing is stored on the model: active adapters, heads and modes are as they were, and within the block other
    threads do not see it. The model's own gradient checkpointing remembers the batch. ``model.generate`` takes one
    setup for each sequence that the model computes; an encoder-decoder searches without beams. The block is for this
    model: another accelerated one raises an error in it.

    Args:
        model: a model of the `adapters` library after ``pelt_fast.accelerate``, itself.
        setups: one for each sample of the batches within the block: the name of an adapter, a ``Stack``, ``Fuse``,
            ``Average`` or ``Split`` of the library, or None, the model without adapters.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: the model is not accelerated; an adapter or a fusion is unknown; a setup acts on whole batches
            (``Parallel``, ``BatchSplit``), has prompt tuning, ReFT or a head of its own, or acts on a layer that was
            left to the library; prefixes of different lengths in a model that cannot mask them. In a forward: the
            number of samples is not that of the setups, or gating scores or fusion's attentions are asked for.
    """
    _check_module(model)
    library = next((lib for lib in _imported() if lib.__name__.endswith(".adapters")), None)
    if library is None or not library.has_layers(model):
        raise ValueError(
            f"model ({type(model).__name__}) has no layer of the adapters library; expected a model after "
            "adapters.init (a PEFT model takes adapter_names=[...] in its call)"
        )
    checks = importlib.import_module(".adapters_mixed_checks", __name__)
    setup: contextlib.AbstractContextManager[Any] = checks.mixed_setup(model, setups)
    return setup


def _imported() -> list[ModuleType]:
    """The integrations whose libraries are in use in this process."""
    return [
        importlib.import_module(f".{name}", __name__)
        for name, definition in _LIBRARIES.items()
        if definition in sys.modules
    ]


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
