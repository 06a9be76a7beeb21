"""What a function of parameters alone gives, kept while they do not change.

Nothing is kept with a graph: only where no gradient can come back is a result taken from here, or put here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")

_SAMPLES = 512  # elements of a parameter that are looked at


class _Kept(NamedTuple):
    parameters: tuple[
        Tensor, ...
    ]  # the very objects, so that none of them can be another's successor
    state: tuple[Any, ...]
    looks: list[Tensor]  # into the parameters' memory
    seen: list[Tensor]  # what was there
    result: Any


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def keep(owner: nn.Module, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
    """``compute()``, or what it gave the last time if that still holds.

    It does while the parameters are the same objects at the same addresses with the same version counters, autocast is
    as it was, and one in some of their elements is the same: a change through ``.data`` leaves no trace in a counter,
    and escapes only if it is of a few elements of a large parameter.

    Args:
        owner: what the result belongs to; with it the result goes.
        parameters: all that ``compute`` reads.
        compute: the same parameters must give the same result, which nobody changes.
    """
    if not _keeps(parameters):
        return compute()
    state = (*[(p.data_ptr(), p._version, p.shape) for p in parameters], *_autocast())
    found = _kept.get(owner)
    if found is None or not _same(found, parameters, state):
        looks = [p.detach().view(-1)[:: max(1, p.numel() // _SAMPLES) | 1] for p in parameters]
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor is of no use later
            seen = [look.clone() for look in looks]
            found = _Kept(tuple(parameters), state, looks, seen, compute())
        _kept[owner] = found
    result: T = found.result
    return result


def _keeps(parameters: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    grad = torch.is_grad_enabled()
    # on a GPU a look at the samples would wait for all that is queued
    return all(
        type(p) in (nn.Parameter, Tensor)
        and p.device.type == "cpu"
        and p.is_contiguous()
        and not p.is_inference()
        and not (grad and p.requires_grad)
        for p in parameters
    )


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def _same(found: _Kept, parameters: Sequence[Tensor], state: tuple[Any, ...]) -> bool:
    return (
        len(found.parameters) == len(parameters)
        and all(a is b for a, b in zip(found.parameters, parameters, strict=True))
        and found.state == state  # the memory that the looks are into is still theirs
        and all(torch.equal(a, b) for a, b in zip(found.looks, found.seen, strict=True))
    )
