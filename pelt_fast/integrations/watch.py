"""Whether what was read from Python objects is still as it was: of a layer with many adapters, asked at each call.

The extension looks in microseconds (``csrc/watch.h``). Without it parameters are compared here, and the rest counts as
changed, so that it is read anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..dispatch import cpp_extension

SAMPLES = 128  # of a parameter's elements, at most


class Watch(Protocol):
    """What was seen."""

    def holds(self) -> bool:
        """Whether it is still so."""
        ...


def watch_modules(
    modules: Sequence[nn.Module],
    attributes: Sequence[str],
    entries: Sequence[tuple[dict[Any, Any], Any]],
) -> Watch:
    """Watches how the modules compute: classes, hooks, forwards, parameters but for their contents.

    Args:
        modules: without children.
        attributes: of the modules that have them, also watched.
        entries: dictionaries and keys whose values are watched.
    """
    extension = cpp_extension()
    if extension is None:
        return _Changed()
    places = list(entries)
    tensors = []
    for module in modules:
        parameters = module._parameters
        places += [(module.__dict__, name) for name in (*_ATTRIBUTES, *attributes)]
        places += [(parameters, name) for name in ("weight", "bias")]
        tensors += [t for t in parameters.values() if t is not None]
    watch: Watch = extension.Watch(list(modules), places, tensors, False, SAMPLES)
    return watch


# of every module: what makes its call more than its class's forward
_ATTRIBUTES = (
    "_parameters",
    "_modules",
    "forward",
    "weight",  # where it is no parameter
    "bias",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def watch_tensors(tensors: Sequence[Tensor]) -> Watch:
    """Watches the contents of tensors, which must not be inference tensors: they count no versions.

    On CPUs also samples of the elements, which show what no version counts, such as a write through ``.data``.
    """
    extension = cpp_extension()
    if extension is None:
        return _Tensors(tensors)
    watch: Watch = extension.Watch([], [], list(tensors), True, SAMPLES)
    return watch


class _Changed:
    def holds(self) -> bool:
        return False


class _Tensors:
    """``samples`` are elements in the parameters' own memory: as long as they live, no other tensor has its address."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.samples = [_sampled(t.detach()) for t in tensors]
        self.key = self._key()
        # to compare is to wait for a GPU
        on_cpu = all(t.device.type == "cpu" for t in tensors)
        self.contents = torch.cat(self.samples) if on_cpu and tensors else None

    def holds(self) -> bool:
        if self._key() != self.key:
            return False
        return self.contents is None or torch.equal(torch.cat(self.samples), self.contents)

    def _key(self) -> Any:
        return [
            (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device) for t in self.tensors
        ]


def _sampled(t: Tensor) -> Tensor:
    """A view of elements at equal distances in memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    step = extent // SAMPLES + 1
    return t.as_strided((-(-extent // step),), (step,))
