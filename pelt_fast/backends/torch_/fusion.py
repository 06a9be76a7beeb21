"""AdapterFusion in the bottleneck space as an ATen composition with our saved-tensor plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import activate, activate_backward
from ...random import keep_scale, philox_mask
from .adapter_block import as_dtype, fresh_sum, normalise, normalise_backward, wide_dtype


def unsupported(problem: Any) -> list[str]:
    """Every problem can run."""
    return []


def priority(problem: Any) -> int:
    """What is left when no kernel of ours can run or is faster."""
    return 10


def adapter_fusion_fwd(
    x: Tensor,
    skip: Tensor | None,
    query: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    score: Tensor,
    score_bias: Tensor | None,
    value: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    widths: Sequence[int],
    temperature: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """y (T, d), q (T, M), k (T, M + N), p (T, N), mean and reciprocal deviation (T, 2) of each layernorm."""
    dtype, wide = x.dtype, wide_dtype(x.dtype)
    pre_stats = post_stats = None
    v = x + skip if skip_in and skip is not None else x
    if pre_weight is not None:
        v, pre_stats = normalise(v, pre_weight, pre_bias, pre_eps)
    q = F.linear(v, down.to(dtype), as_dtype(down_bias, dtype))
    k = F.linear(v if query is None else query, score.to(dtype), as_dtype(score_bias, dtype))
    h, bottleneck = activate(q, activation).to(wide), q.shape[1]
    scores = _sums(h * k[:, :bottleneck], widths) + k[:, bottleneck:]
    keep = _keep(scores, seed, dropout_p)
    p = torch.softmax(_dropped(scores, keep, dropout_p) / temperature, -1)
    s = _weighted(h, p, widths).to(dtype) @ value.to(dtype)
    if residual_x:
        s += x
    if residual_skip and skip is not None:
        s += skip
    if ln_weight is not None:
        s, post_stats = normalise(s, ln_weight, ln_bias, eps)
    return s, q, k, p, pre_stats, post_stats


def adapter_fusion_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    p: Tensor,
    pre_stats: Tensor | None,
    post_stats: Tensor | None,
    x: Tensor,
    skip: Tensor | None,
    query: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    score: Tensor,
    score_bias: Tensor | None,
    value: Tensor,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    widths: Sequence[int],
    temperature: float,
    pre_eps: float,
    eps: float,
    dropout_p: float,
    skip_in: bool,
    residual_x: bool,
    residual_skip: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dy (T, d) -> the gradients that ``needs`` asks for, in the order of ``GRADIENTS`` in ``pelt_fast/ops``."""
    need_x, need_skip, need_query, need_down, need_down_bias, need_score, need_score_bias, *more = (
        needs
    )
    need_value, need_pre_weight, need_pre_bias, need_ln_weight, need_ln_bias = more
    dtype, wide, bottleneck = x.dtype, wide_dtype(x.dtype), q.shape[1]
    h = activate(q, activation).to(wide)
    a = _weighted(h, p, widths).to(dtype)

    ds, dln, dln_bias = dy, None, None
    if ln_weight is not None and post_stats is not None:
        s = a @ value.to(dtype)
        s = s + x if residual_x else s
        s = s + skip if residual_skip and skip is not None else s
        mask = [True, need_ln_weight, need_ln_bias]
        ds, dln, dln_bias = normalise_backward(dy, s, post_stats, ln_weight, ln_bias, mask)

    need_v = need_x or need_skip or need_pre_weight or need_pre_bias
    need_q = need_v or need_down or need_down_bias
    need_k = (need_v and query is None) or need_query or need_score or need_score_bias
    z = x + skip if skip_in and skip is not None else x
    v = z
    if (need_down or (need_score and query is None)) and pre_weight is not None:
        v = normalise(z, pre_weight, pre_bias, pre_eps)[0]
    dq = dk = dz = dquery = dpre = dpre_bias = None
    if need_q or need_k:
        da = (ds @ value.to(dtype).T).to(wide)
        along = da[:, :bottleneck]
        dp = _sums(along * h, widths) + da[:, bottleneck:]
        dscores = p * (dp - (p * dp).sum(1, keepdim=True)) / temperature
        dscores = _dropped(dscores, _keep(p, seed, dropout_p), dropout_p)
        if need_q:
            dh = along * _each(p, widths) + _each(dscores, widths) * k[:, :bottleneck]
            dq = activate_backward(dh, q.to(wide), activation).to(dtype)
        if need_k:
            dk = _weighted(h, dscores, widths).to(dtype)
    if need_query and dk is not None:
        dquery = dk @ score.to(dtype)
    if need_v and dq is not None:
        dz = dq @ down.to(dtype)
        if query is None and dk is not None:
            dz += dk @ score.to(dtype)
        if pre_weight is not None and pre_stats is not None:
            mask = [need_x or need_skip, need_pre_weight, need_pre_bias]
            dz, dpre, dpre_bias = normalise_backward(dz, z, pre_stats, pre_weight, pre_bias, mask)
    found = (
        fresh_sum(dz, ds if residual_x else None) if need_x else None,
        fresh_sum(dz if skip_in else None, ds if residual_skip else None) if need_skip else None,
        dquery,
        dq.T @ v if need_down and dq is not None else None,
        dq.sum(0, dtype=wide) if need_down_bias and dq is not None else None,
        dk.T @ (v if query is None else query) if need_score and dk is not None else None,
        dk.sum(0, dtype=wide) if need_score_bias and dk is not None else None,
        a.T @ ds if need_value else None,
        dpre,
        dpre_bias,
        dln,
        dln_bias,
    )
    owners = [x, skip, query, down, down_bias, score, score_bias, value]
    owners += [pre_weight, pre_bias, ln_weight, ln_bias]
    return [
        None if g is None or owner is None else g.to(owner.dtype)
        for g, owner in zip(found, owners, strict=True)
    ]


def _each(p: Tensor, widths: Sequence[int]) -> Tensor:
    """(T, N) -> (T, M): a segment's number for each element of it."""
    if len(set(widths)) == 1:
        return p[:, :, None].expand(-1, -1, widths[0]).reshape(len(p), -1)
    return torch.cat([p[:, n : n + 1].expand(-1, m) for n, m in enumerate(widths)], 1)


def _sums(value: Tensor, widths: Sequence[int]) -> Tensor:
    """(T, M) -> (T, N): the sum of each segment."""
    if len(set(widths)) == 1:
        return value.unflatten(1, (len(widths), widths[0])).sum(2)
    return torch.stack([part.sum(1) for part in value.split(list(widths), 1)], 1)


def _weighted(h: Tensor, p: Tensor, widths: Sequence[int]) -> Tensor:
    """[p_{n(j)} h_j, p_n] (T, M + N)."""
    return torch.cat((h * _each(p, widths), p), 1)


def _keep(scores: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    return (
        None if seed is None else philox_mask(seed, (scores.shape[0], scores.shape[1]), dropout_p)
    )


def _dropped(value: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return value if keep is None else torch.where(keep, value, 0.0) * keep_scale(dropout_p)
