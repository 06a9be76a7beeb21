"""Files of the `adapters` library, complete: parameters that all layers share are in them.

The library (1.3.0) leaves ``shared_parameters`` out of the files of models without a head, Compacter's rule and VeRA's
matrices with them: it looks for their keys behind a dot, which such a model's keys do not have, and what it then loads
is an adapter with a rule drawn at random. Behind the model's prefix, as in the file of a model with a head, the library
finds them, so that the files written here load in the library as they are, in models with a head and without, under any
name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FILES = ("adapter.safetensors", "pytorch_adapter.bin")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], name: str, **options: Any
) -> None:
    """``model.save_adapter(folder, name, **options)``, and in the file what the library leaves out of it.

    Args:
        model: a model of the `adapters` library, accelerated or not.
        folder: where the files go. ``model.load_adapter(folder)`` reads them, with or without pelt_fast.
        name: the adapter's.
        **options: the method's own (``use_safetensors``, ``with_head``, ...).

    Raises:
        TypeError: ``model`` has no ``save_adapter``.
        ValueError: the library's: there is no such adapter.
    """
    save: Any = getattr(model, "save_adapter", None)
    if not isinstance(model, nn.Module) or save is None:
        raise TypeError(
            f"model is a {type(model).__name__}; expected a model of the adapters library, with save_adapter"
        )
    save(os.fspath(folder), name, **options)
    start = f"shared_parameters.{name}."
    shared = {key: value for key, value in model.state_dict().items() if key.startswith(start)}
    if not shared:
        return
    path = _written(Path(folder), bool(options.get("use_safetensors")))
    state = _read(path)
    if any(start in key for key in state):
        return
    prefix = f"{model.base_model_prefix}."
    _write(path, {prefix + key: value.contiguous() for key, value in {**state, **shared}.items()})


def _written(folder: Path, safe: bool) -> Path:
    """The file of weights that the library has just written."""
    return folder / _FILES[0 if safe else 1]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _write(path: Path, state: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
