"""Bottleneck adapters and prefixes out of other packages' checkpoints; and ``save_adapter``, whose files lack nothing.

| written by | what is read |
|---|---|
| `adapters` (AdapterHub) | the folder of ``save_adapter``; version 1.3.0 and the formats that it still reads |
| OpenDelta 0.3.2 | the folder of ``save_finetuned``: adapters, parallel adapters, low-rank adapters of rank 1 |
| google-research/adapter-bert | the variables of a TensorFlow checkpoint, as a mapping or an ``.npz`` file |

``convert`` writes OpenDelta's checkpoints, of more methods than these, as those of `adapters` and PEFT, and back.
Prefixes (``load_prefixes``) are read from `adapters` and from PEFT.

Files are read without running what is in them: pickles with ``weights_only=True``, ``.npz`` without objects. They may
name plain tensors alone, and unpack to no more than a few times their size. All of a checkpoint is checked before
anything is returned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..nn import BottleneckAdapter
from . import adapter_bert, adapterhub, convert, opendelta
from .prefix import load_prefixes
from .shared import save_adapter
from .source import Checkpoint, read
from .tensors import Array

__all__ = [
    "convert",
    "load_bottleneck_adapters",
    "load_other_parameters",
    "load_prefixes",
    "save_adapter",
]

_FORMATS = (adapterhub, opendelta, adapter_bert)


def load_bottleneck_adapters(
    source: str | os.PathLike[str] | Mapping[str, Array],
    *,
    config: Mapping[str, Any] | str | None = None,
    name: str | None = None,
) -> dict[str, BottleneckAdapter]:
    """The bottleneck adapters of a checkpoint, by the path of the module that they belong to.

    Paths are those of the checkpoint's keys, up to the adapter: of the module whose output the adapter reads
    (``encoder.layer.0.attention.output`` and the like); for OpenDelta's parallel adapters, of the module whose input
    it reads. adapter-bert's are written as transformers writes them (``bert.encoder.layer.0.output``).

    The adapters compute what they compute where they come from:

    - `adapters`: ``adapter(hidden_states, input_tensor, layer_norm)``, as its config says. In models that the library
      reaches through hooks, the model adds residual and layernorm: set ``original_ln_after = False`` there, as the
      library does.
    - OpenDelta: ``adapter(hidden_states)``, x + U act(D x). Parallel: ``adapter(output, input)``; ``scaled`` is not
      used there, the factor is 1. Low-rank adapters of rank 1 come as the dense matrices that they are.
    - adapter-bert: ``adapter(hidden_states, input_tensor, layer_norm)``, Houlsby with the tanh form of gelu. The
      layernorms were trained with them: ``load_other_parameters``.

    Args:
        source: a folder, a file (``.bin``, ``.pt``, ``.safetensors``, ``.npz``), or tensors or arrays by name.
            TensorFlow: ``{n: tf.train.load_variable(path, n) for n, _ in tf.train.list_variables(path)}``.
        config: what the folder's JSON file holds, for a source without one: the library's config (needed), or
            OpenDelta's, of which ``non_linearity`` is read (default: its own, "gelu_new").
        name: the adapter's name, where weights of the library hold several.

    Returns:
        A ``BottleneckAdapter`` for each path, on the CPU, in the checkpoint's dtypes, in the order of its keys.

    Raises:
        FileNotFoundError: there is no such file or folder, or a folder lacks its weights.
        OSError: the path cannot be looked up.
        TypeError: an argument or one of source's values has a wrong type.
        ValueError: it cannot be read, or holds no bottleneck adapters, or incomplete ones, or ones that do not fit
            their config, or that cannot run: sparse, quantized, on meta, of other dtypes than float32, bfloat16,
            float16 and float64, or of several that do not go together. Infinite and NaN weights are no error, as in
            the libraries.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; expected a str or None")
    checkpoint = read(source, config)
    for form in _FORMATS:
        if form.holds_adapters(checkpoint):
            return form.adapters(checkpoint, name)
    raise ValueError(f"{checkpoint.origin} holds no bottleneck adapters; {_seen(checkpoint)}")


def load_other_parameters(
    source: str | os.PathLike[str] | Mapping[str, Array],
) -> dict[str, Tensor]:
    """What a checkpoint trained beside its adapters, under the names of a transformers ``state_dict``.

    adapter-bert trains the layernorms and the head (``output_weights`` becomes ``classifier.weight``). OpenDelta's
    files hold whatever was left unfrozen. `adapters` keeps heads in files of their own: nothing. Meant for
    ``model.load_state_dict(..., strict=False)``.

    Args and errors as ``load_bottleneck_adapters``.
    """
    checkpoint = read(source, None)
    for form in _FORMATS:
        if form.holds_adapters(checkpoint):
            return form.others(checkpoint)
    raise ValueError(f"{checkpoint.origin} holds no bottleneck adapters; {_seen(checkpoint)}")


def _seen(checkpoint: Checkpoint) -> str:
    keys = list(checkpoint.values)
    if not keys:
        return "it is empty"
    if any(".compactor." in key or ".phm_rule" in key for key in keys):
        return "Compacter's projections are no plain matrices"
    return f"expected keys of adapters, OpenDelta or adapter-bert, not such as {keys[0]!r}"
