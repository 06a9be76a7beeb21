"""BitFit (Ben-Zaken et al. 2022): the biases of a model train, beside adapters or alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = "biases.safetensors"
# where the `adapters` library keeps what it adds to a model, by the name of the adapter
_LIBRARY = frozenset(
    (
        *("adapters", "adapter_fusion_layer", "invertible_adapters", "loras", "prefix_gates"),
        *("prefix_tunings", "prompt_tunings", "refts", "heads"),
    )
)


class BitFit:
    """The biases of the model itself, as they are trained, saved, loaded and taken back.

    They are those of every layer below the head, layernorms included, and none of what `adapters` and PEFT add.
    From here on they require gradients; no other parameter changes its flag. Both libraries freeze the model when an
    adapter is put up for training (``train_adapter``, ``get_peft_model``), so this comes after it. Training them costs
    no kernel: the gradient of a bias comes out of a pass over dy that is there anyway.

    Args:
        model: a model of transformers, `adapters` or PEFT, accelerated or not, or any module.
        include: regular expressions: of the biases, those train in whose name one of them is found. None: all.
        train: False leaves the flags as they are, to load biases for inference.

    Raises:
        TypeError: ``model`` is no module, ``include`` no sequence of strings.
        ValueError: there is no such bias (T5 and Llama have none).
    """

    def __init__(
        self, model: nn.Module, include: Sequence[str] | None = None, *, train: bool = True
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        if include is not None and (
            isinstance(include, str) or not all(isinstance(part, str) for part in include)
        ):
            raise TypeError(f"include is {include!r}; expected a sequence of regular expressions")
        found = dict(_biases(_base(model)))
        names = [n for n in found if include is None or any(re.search(part, n) for part in include)]
        if not names:
            which = "" if include is None else f" whose name has one of {list(include)}"
            raise ValueError(
                f"model ({type(model).__name__}) has no bias{which} below its head; expected one at least"
            )
        self.model = model
        self.names = tuple(names)
        self._original = {n: found[n].detach().clone() for n in names}
        self._flags = {n: found[n].requires_grad for n in names}
        if train:
            for parameter in self.parameters():
                parameter.requires_grad_(True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The biases, as an optimizer takes them."""
        yield from self._found().values()

    def state_dict(self) -> dict[str, Tensor]:
        """The biases by name; names begin below the head, so that they are those of the bare model."""
        return {name: parameter.detach() for name, parameter in self._found().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The biases of ``state`` into the model, in the model's dtype and on its device.

        Raises:
            TypeError: ``state`` is no mapping of floating tensors. Nothing is changed then, and likewise:
            ValueError: names or shapes are not these biases', or a value is not finite in the model's dtype.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is a {type(state).__name__}; expected a mapping of tensors")
        found = self._found()
        missing, unknown = sorted(found.keys() - state.keys()), sorted(state.keys() - found.keys())
        if missing or unknown:
            raise ValueError(
                f"state lacks {_some(missing)} and has {_some(unknown)} beside; expected {len(found)} biases, "
                "those of this model"
            )
        ready = {name: _fitting(name, state[name], parameter) for name, parameter in found.items()}
        for name, parameter in found.items():
            parameter.copy_(ready[name])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``biases.safetensors`` into the folder, where the adapter's files may stand too; needs safetensors."""
        from safetensors.torch import save_file

        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: b.contiguous().cpu() for n, b in self.state_dict().items()}, path)
        return path

    def load(self, folder: str | os.PathLike[str]) -> None:
        """The biases that ``save`` wrote into the folder.

        Raises:
            FileNotFoundError: there are none.
            TypeError, ValueError: it is no file of tensors, or not of this model's biases. Nothing is changed then.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there; expected the file that BitFit.save writes"
            )
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no file of tensors that can be read: {error}") from error
        self.load_state_dict(state)

    def restore(self) -> None:
        """The biases and their flags are again what they were when this object was made."""
        self.load_state_dict(self._original)
        for name, parameter in self._found().items():
            parameter.requires_grad_(self._flags[name])

    def __repr__(self) -> str:
        numbers = sum(parameter.numel() for parameter in self.parameters())
        return f"BitFit({type(self.model).__name__}: {len(self.names)} biases, {numbers} numbers)"

    def _found(self) -> dict[str, nn.Parameter]:
        """Looked up at each call: a library may have wrapped a layer since, or put a new parameter into it."""
        found = dict(_biases(_base(self.model)))
        return {name: found[name] for name in self.names}


def _fitting(name: str, value: Any, parameter: nn.Parameter) -> Tensor:
    """``value`` in the parameter's dtype and on its device."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        came = type(value).__name__ if not isinstance(value, Tensor) else str(value.dtype)
        where = " on the meta device" if isinstance(value, Tensor) and value.is_meta else ""
        raise TypeError(f"state[{name!r}] is {came}{where}; expected a tensor of numbers")
    if value.shape != parameter.shape:
        raise ValueError(
            f"state[{name!r}] has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}"
        )
    fitting = value.to(parameter)
    if not fitting.isfinite().all():
        raise ValueError(
            f"state[{name!r}] has numbers that are not finite in {parameter.dtype}; expected finite ones"
        )
    return fitting


def _base(model: nn.Module) -> nn.Module:
    """The model below PEFT and below the head."""
    unwrap: Any = getattr(model, "get_base_model", None)
    if unwrap is not None:
        return _base(unwrap())
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) else model


def _biases(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Biases by name; PEFT's wrapper around a layer (``base_layer``) is not in it."""
    for name, parameter in module._parameters.items():
        if name == "bias" and parameter is not None:
            yield prefix + name, parameter
    # PEFT's layers name what they hold of adapters, and modules_to_save
    added = {*getattr(module, "adapter_layer_names", ()), "modules_to_save"}
    for name, child in module._modules.items():
        library = name in _LIBRARY and isinstance(child, nn.ModuleDict)
        if child is not None and not library and name not in added:
            yield from _biases(child, prefix if name == "base_layer" else f"{prefix}{name}.")


def _some(names: Sequence[str]) -> str:
    """A few of the names, for an error."""
    shown = ", ".join(names[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
