"""UniPELT's variants on a model of the `adapters` library: AP, APL, APLB and what else their letters spell."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import BitFit

_METHODS = {"P": "prefix_tuning", "A": "adapter", "L": "lora"}  # in the order of UniPELTConfig


def unipelt_config(
    variant: str = "APL",
    *,
    prefix_tuning: Any = None,
    adapter: Any = None,
    lora: Any = None,
    gating: bool = True,
) -> Any:
    """The library's ``ConfigUnion`` of the submodules that a variant of UniPELT (Mao et al. 2022) names.

    Args:
        variant: letters in any order: A, a bottleneck adapter; P, a prefix; L, LoRA. "APL" is ``UniPELTConfig``.
        prefix_tuning: a ``PrefixTuningConfig`` in place of UniPELT's, of 10 tokens.
        adapter: a ``BnConfig`` in place of UniPELT's, ``SeqBnConfig(reduction_factor=16)``.
        lora: a ``LoRAConfig`` in place of UniPELT's, ``r=8, alpha=2``.
        gating: whether the submodules have their gates.

    Raises:
        TypeError: ``variant`` is no string.
        ValueError: its letters are none of these, or it has B, which is no config (``add_unipelt``); a config is given
            for a submodule that it does not have.
    """
    import adapters

    letters = _letters(variant)
    if "B" in letters:
        raise ValueError(
            f"variant is {variant!r}; expected letters of A, P and L: B, the model's own biases, is no config of the "
            "library. pelt_fast.add_unipelt adds both, pelt_fast.nn.BitFit the biases"
        )
    given = {"prefix_tuning": prefix_tuning, "adapter": adapter, "lora": lora}
    default = {
        "prefix_tuning": adapters.PrefixTuningConfig(prefix_length=10),
        "adapter": adapters.SeqBnConfig(reduction_factor=16),
        "lora": adapters.LoRAConfig(r=8, alpha=2),
    }
    for letter, name in _METHODS.items():
        if given[name] is not None and letter not in letters:
            raise ValueError(f"{name} is given; expected None, since variant {variant!r} has none")
    names = [name for letter, name in _METHODS.items() if letter in letters]
    configs = [default[name] if given[name] is None else given[name] for name in names]
    return adapters.ConfigUnion(*[config.replace(use_gating=gating) for config in configs])


def add_unipelt(model: nn.Module, name: str, variant: str = "APL", **options: Any) -> BitFit | None:
    """Adds a variant of UniPELT to a model of the `adapters` library and puts it up for training.

    ``add_adapter`` and ``train_adapter`` of the library; ``save_adapter`` and ``load_adapter`` go with them as ever.
    With a B in the variant the model's own biases train too, and stand in a file of their own::

        biases = pelt_fast.add_unipelt(model, "task", "APLB")
        pelt_fast.accelerate(model)  # train
        model.save_adapter("folder", "task")
        biases.save("folder")

        other.load_adapter("folder", set_active=True)
        pelt_fast.nn.BitFit(other, train=False).load("folder")

    Args:
        model: after ``adapters.init``, or an ``AdapterModel``.
        name: of the adapter.
        variant: as in ``unipelt_config``; and B: BitFit.
        **options: those of ``unipelt_config``.

    Returns:
        What trains, saves and restores the biases, where the variant has a B; else None.

    Raises:
        TypeError: ``model`` is none of the library's, ``variant`` no string.
        ValueError: as in ``unipelt_config``; or there is a B, and the model has no biases.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "train_adapter"):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a model after adapters.init, or an AdapterModel"
        )
    letters = _letters(variant)
    config = unipelt_config("".join(letters - {"B"}), **options)
    if "B" in letters:
        BitFit(model, train=False)  # a model without biases is left as it was
    method: Any = model
    method.add_adapter(name, config=config)
    method.train_adapter(name)
    return BitFit(model) if "B" in letters else None


def _letters(variant: Any) -> set[str]:
    if not isinstance(variant, str):
        raise TypeError(f"variant is a {type(variant).__name__}; expected a string as 'APL'")
    letters = set(variant)
    if len(letters) != len(variant) or not letters <= {*_METHODS, "B"} or letters <= {"B"}:
        raise ValueError(
            f"variant is {variant!r}; expected letters of A, P and L, one at least and each once, and B or none"
        )
    return letters
