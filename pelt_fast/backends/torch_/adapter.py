"""The bottleneck adapter as an ATen composition with our saved-tensor plan: the pre-activation and row statistics.

Runs wherever torch runs, and may win there: with a large bottleneck the GEMMs are all that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import activate, activate_backward
from ...random import keep_scale, philox_mask

_layer_norm = torch.ops.aten.native_layer_norm.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run or is faster."""
    return 10


def bottleneck_adapter_fwd(
    x: Tensor,
    skip: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x (T, d) -> y (T, d), q (T, m), and mean and reciprocal deviation (T, 2) of each layernorm."""
    dtype = x.dtype
    pre_stats = post_stats = None
    v = x + skip if skip_in and skip is not None else x
    if pre_weight is not None:
        v, pre_stats = _normalise(v, pre_weight, pre_bias, pre_eps)
    q = F.linear(v, down.to(dtype), _as(down_bias, dtype))
    s = F.linear(activate(q, activation), up.to(dtype), _as(up_bias, dtype))
    s = _times(s, scaling, scale, gate, _keep(x, seed, dropout_p), dropout_p)
    if residual_x:
        s += x
    if residual_skip and skip is not None:
        s += skip
    if ln_weight is not None:
        s, post_stats = _normalise(s, ln_weight, ln_bias, eps)
    return s, q, pre_stats, post_stats


def bottleneck_adapter_bwd(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    q: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    scaling: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dy (T, d) -> the gradients that ``needs`` asks for, in the order of ``GRADIENTS`` in ``pelt_fast/ops``."""
    need = _Needs(*needs)
    dtype, wide = x.dtype, _wide(x.dtype)
    a, w = activate(q, activation), None
    if ln_weight is not None or need.scale or need.gate:
        w = F.linear(a, up.to(dtype), _as(up_bias, dtype))

    ds, dln, dln_bias = dy, None, None
    keep = _keep(x, seed, dropout_p)
    if ln_weight is not None and post_stats is not None and w is not None:
        s = _times(w, scaling, scale, gate, keep, dropout_p)
        s = s + x if residual_x else s
        s = s + skip if residual_skip and skip is not None else s
        mask = [True, need.ln_weight, need.ln_bias]
        ds, dln, dln_bias = _normalise_backward(dy, s, post_stats, ln_weight, ln_bias, mask)

    dscale = dgate = None
    if need.scale and scale is not None and w is not None:
        sums = _times(ds.to(wide) * w, scaling, None, gate, keep, dropout_p).sum(0)
        dscale = sums if scale.numel() > 1 else sums.sum(0, keepdim=True)
    if need.gate and w is not None:
        dgate = _times(ds.to(wide) * w, scaling, scale, None, keep, dropout_p).sum(1)

    dw = _times(ds, scaling, scale, gate, keep, dropout_p)
    dz = dq = dpre = dpre_bias = ddown = None
    z = x + skip if skip_in and skip is not None else x
    need_z = need.x or need.skip or need.pre_weight or need.pre_bias
    if need_z or need.down or need.down_bias:
        da = dw @ up.to(dtype)
        dq = activate_backward(da.to(wide), q.to(wide), activation).to(dtype)
    if need_z and dq is not None:
        dz = dq @ down.to(dtype)
        if pre_weight is not None and pre_stats is not None:
            mask = [need.x or need.skip, need.pre_weight, need.pre_bias]
            dz, dpre, dpre_bias = _normalise_backward(dz, z, pre_stats, pre_weight, pre_bias, mask)
    if need.down and dq is not None:
        v = z if pre_weight is None else _normalise(z, pre_weight, pre_bias, pre_eps)[0]
        ddown = dq.T @ v
    found = {
        "x": _sum(dz, ds if residual_x else None) if need.x else None,
        "skip": _sum(dz if skip_in else None, ds if residual_skip else None) if need.skip else None,
        "down": ddown,
        "down_bias": dq.sum(0, dtype=wide) if need.down_bias and dq is not None else None,
        "up": dw.T @ a if need.up else None,
        "up_bias": dw.sum(0, dtype=wide) if need.up_bias else None,
        "scale": dscale,
        "gate": dgate,
        "pre_weight": dpre,
        "pre_bias": dpre_bias,
        "ln_weight": dln,
        "ln_bias": dln_bias,
    }
    owners = [x, skip, down, down_bias, up, up_bias, scale, gate]
    owners += [pre_weight, pre_bias, ln_weight, ln_bias]
    return [
        None if g is None or owner is None else g.to(owner.dtype)
        for g, owner in zip(found.values(), owners, strict=True)
    ]


class _Needs(NamedTuple):
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _as(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _keep(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    return None if seed is None else philox_mask(seed, (x.shape[0], x.shape[1]), dropout_p)


def _times(
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


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Fresh: what an operator returns must not be one of its arguments."""
    if first is None:
        return None if second is None else second.clone()
    return first if second is None else first + second


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The layernorm of rows, and (T, 2): mean, 1 / deviation."""
    dtype = x.dtype
    y, mean, rstd = _layer_norm(x, [x.shape[1]], weight.to(dtype), _as(bias, dtype), eps)
    return y, torch.cat((mean, rstd), 1).to(_wide(dtype))


def _normalise_backward(
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
    weight, bias = weight.to(x.dtype), _as(bias, x.dtype)
    dx, dweight, dbias = _layer_norm_backward(dy, x, [x.shape[1]], mean, rstd, weight, bias, mask)
    return dx, dweight, dbias
