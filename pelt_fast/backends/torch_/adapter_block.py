"""What goes around the two projections of an adapter, forward and backward, as an ATen composition.

Saved are the pre-activation and row statistics. The projections are dense (``adapter.py``) or PHM (``compacter.py``).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...activations import activate, activate_backward
from ...random import keep_scale, philox_mask

_layer_norm = torch.ops.aten.native_layer_norm.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class Projection(Protocol):
    """A weight W (out, in), in whatever form."""

    def linear(self, v: Tensor, bias: Tensor | None) -> Tensor:
        """v Wᵀ + bias, fresh."""
        ...

    def back(self, dy: Tensor) -> Tensor:
        """dy W."""
        ...

    def gradients(self, dy: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        """Of the tensors of the weight; those that nobody needs may be None."""
        ...


class Block(NamedTuple):
    """The rest of the call; all of it as the operator takes it."""

    down_bias: Tensor | None
    up_bias: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    seed: Tensor | None
    activation: str
    scaling: float
    pre_eps: float
    eps: float
    dropout_p: float
    skip_in: bool
    residual_x: bool
    residual_skip: bool


class Needs(NamedTuple):
    """Which gradients are wanted; ``down`` and ``up``: any of the projection's."""

    x: bool
    skip: bool
    down: bool
    down_bias: bool
    up: bool
    up_bias: bool
    scale: bool
    gate: bool
    pre_weight: bool
    pre_bias: bool
    ln_weight: bool
    ln_bias: bool


class Gradients(NamedTuple):
    """Each in the dtype that it was made in."""

    x: Tensor | None
    skip: Tensor | None
    down: tuple[Tensor | None, ...]  # empty where not needed
    down_bias: Tensor | None
    up: tuple[Tensor | None, ...]
    up_bias: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None


def forward(
    x: Tensor, skip: Tensor | None, down: Projection, up: Projection, b: Block
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x (T, d) -> y (T, d), q (T, m), and mean and reciprocal deviation (T, 2) of each layernorm."""
    dtype = x.dtype
    pre_stats = post_stats = None
    v = x + skip if b.skip_in and skip is not None else x
    if b.pre_weight is not None:
        v, pre_stats = normalise(v, b.pre_weight, b.pre_bias, b.pre_eps)
    q = down.linear(v, as_dtype(b.down_bias, dtype))
    s = up.linear(activate(q, b.activation), as_dtype(b.up_bias, dtype))
    s = times(s, b.scaling, b.scale, b.gate, _keep(x, b.seed, b.dropout_p), b.dropout_p)
    if b.residual_x:
        s += x
    if b.residual_skip and skip is not None:
        s += skip
    if b.ln_weight is not None:
        s, post_stats = normalise(s, b.ln_weight, b.ln_bias, b.eps)
    return s, q, pre_stats, post_stats


def backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    down: Projection,
    up: Projection,
    b: Block,
    need: Needs,
) -> Gradients:
    """dy (T, d) -> the gradients that are needed, and of the projections what comes with them."""
    dtype, wide = x.dtype, wide_dtype(x.dtype)
    a, w = activate(q, b.activation), None
    if b.ln_weight is not None or need.scale or need.gate:
        w = up.linear(a, as_dtype(b.up_bias, dtype))

    ds, dln, dln_bias = dy, None, None
    keep = _keep(x, b.seed, b.dropout_p)
    if b.ln_weight is not None and post_stats is not None and w is not None:
        s = times(w, b.scaling, b.scale, b.gate, keep, b.dropout_p)
        s = s + x if b.residual_x else s
        s = s + skip if b.residual_skip and skip is not None else s
        mask = [True, need.ln_weight, need.ln_bias]
        ds, dln, dln_bias = normalise_backward(dy, s, post_stats, b.ln_weight, b.ln_bias, mask)

    dscale = dgate = None
    if need.scale and b.scale is not None and w is not None:
        sums = times(ds.to(wide) * w, b.scaling, None, b.gate, keep, b.dropout_p).sum(0)
        dscale = sums if b.scale.numel() > 1 else sums.sum(0, keepdim=True)
    if need.gate and w is not None:
        dgate = times(ds.to(wide) * w, b.scaling, b.scale, None, keep, b.dropout_p).sum(1)

    dw = times(ds, b.scaling, b.scale, b.gate, keep, b.dropout_p)
    dz = dq = dpre = dpre_bias = None
    ddown: tuple[Tensor | None, ...] = ()
    z = x + skip if b.skip_in and skip is not None else x
    need_z = need.x or need.skip or need.pre_weight or need.pre_bias
    if need_z or need.down or need.down_bias:
        da = up.back(dw)
        dq = activate_backward(da.to(wide), q.to(wide), b.activation).to(dtype)
    if need_z and dq is not None:
        dz = down.back(dq)
        if b.pre_weight is not None and pre_stats is not None:
            mask = [need.x or need.skip, need.pre_weight, need.pre_bias]
            dz, dpre, dpre_bias = normalise_backward(
                dz, z, pre_stats, b.pre_weight, b.pre_bias, mask
            )
    if need.down and dq is not None:
        v = z if b.pre_weight is None else normalise(z, b.pre_weight, b.pre_bias, b.pre_eps)[0]
        ddown = down.gradients(dq, v)
    return Gradients(
        x=fresh_sum(dz, ds if b.residual_x else None) if need.x else None,
        skip=fresh_sum(dz if b.skip_in else None, ds if b.residual_skip else None)
        if need.skip
        else None,
        down=ddown,
        down_bias=dq.sum(0, dtype=wide) if need.down_bias and dq is not None else None,
        up=up.gradients(dw, a) if need.up else (),
        up_bias=dw.sum(0, dtype=wide) if need.up_bias else None,
        scale=dscale,
        gate=dgate,
        pre_weight=dpre,
        pre_bias=dpre_bias,
        ln_weight=dln,
        ln_bias=dln_bias,
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated in."""
    return torch.promote_types(dtype, torch.float32)


def as_dtype(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``value`` in ``dtype``, or None."""
    return None if value is None else value.to(dtype)


def _keep(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    return None if seed is None else philox_mask(seed, (x.shape[0], x.shape[1]), dropout_p)


def times(
    value: Tensor,
    scaling: float,
    scale: Tensor | None,
    gate: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """gate · keep / (1 - p) · scaling · scale · value, in the dtype of ``value``; dropped NaN is gone."""
    factor: Tensor | float = scaling if keep is None else scaling * keep_scale(dropout_p)
    if scale is not None:
        factor = factor * scale
    if gate is not None:
        factor = factor * gate[:, None]
    if isinstance(factor, Tensor):
        value = value * factor.to(value.dtype)
    elif factor != 1.0:
        value = value * factor
    return value if keep is None else torch.where(keep, value, 0.0)


def fresh_sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Fresh: what an operator returns must not be one of its arguments."""
    if first is None:
        return None if second is None else second.clone()
    return first if second is None else first + second


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The layernorm of rows, and (T, 2): mean, 1 / deviation."""
    dtype = x.dtype
    y, mean, rstd = _layer_norm(x, [x.shape[1]], weight.to(dtype), as_dtype(bias, dtype), eps)
    return y, torch.cat((mean, rstd), 1).to(wide_dtype(dtype))


def normalise_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, as far as the mask asks for them."""
    # the mean and deviation in what the forward gave them: x's dtype on a CPU, fp32 on a GPU
    dtype = x.dtype if x.device.type == "cpu" else stats.dtype
    mean, rstd = (part.contiguous().to(dtype) for part in stats.split(1, 1))
    weight, bias = weight.to(x.dtype), as_dtype(bias, x.dtype)
    dx, dweight, dbias = _layer_norm_backward(dy, x, [x.shape[1]], mean, rstd, weight, bias, mask)
    return dx, dweight, dbias
