"""The Compacter adapter on a backend's kernels for dense bottleneck adapters.

H is built, and its gradient becomes that of its factors. H is small, (d × m): on a GPU one pass over x in a fused
kernel is worth more than the products that doing without H saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..phm import PHM, dense, dense_backward


class Operations(NamedTuple):
    """The two operations of the family."""

    forward: Callable[..., Any]
    backward: Callable[..., list[Tensor | None]]


def through(adapter: Any) -> Operations:
    """Those that a module with ``bottleneck_adapter_fwd`` and ``bottleneck_adapter_bwd`` computes."""

    def forward(x: Tensor, skip: Tensor | None, *rest: Any) -> Any:
        _, _, parameters = _dense(x, rest)
        return adapter.bottleneck_adapter_fwd(x, skip, *parameters)

    def backward(
        dy: Tensor,
        x: Tensor,
        skip: Tensor | None,
        q: Tensor,
        pre_stats: Tensor | None,
        post_stats: Tensor | None,
        *rest: Any,
    ) -> list[Tensor | None]:
        *rest_, needs = rest
        down, up, parameters = _dense(x, tuple(rest_))
        needed = [*needs[:2], any(needs[2:5]), needs[5], any(needs[6:9]), *needs[9:]]
        dx, dskip, ddown, ddown_bias, dup, dup_bias, *others = adapter.bottleneck_adapter_bwd(
            dy, x, skip, q, pre_stats, post_stats, *parameters, needed
        )
        grads = [dx, dskip, *_of_factors(down, ddown), ddown_bias, *_of_factors(up, dup), dup_bias]
        owners = [x, skip, *rest_[:14]]
        return [
            g.to(owner.dtype).contiguous() if need and g is not None else None
            for g, owner, need in zip([*grads, *others], owners, needs, strict=True)
        ]

    return Operations(forward, backward)


def _dense(x: Tensor, rest: tuple[Any, ...]) -> tuple[PHM, PHM, list[Any]]:
    """Both weights in the dtype that accumulates, and the operator's arguments with matrices in their places."""
    wide = torch.promote_types(x.dtype, torch.float32)
    down, up = (PHM(*(factor.to(wide) for factor in rest[i : i + 3])) for i in (0, 4))
    return down, up, [dense(down), rest[3], dense(up), rest[7], *rest[8:]]


def _of_factors(weight: PHM, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if dh is None else dense_backward(weight, dh.contiguous())
