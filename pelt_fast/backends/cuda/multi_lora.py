"""Multi-LoRA in CUDA C++, forward: ``csrc/cuda/multi_lora.cu``, made for few tokens of many adapters (decoding)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import library_obstacles

_MAX_RANK = 256
_PASS_COLUMNS = 256  # of K: what a warp covers at once
_MAX_SPLITS = 16


def unsupported(problem: Any) -> list[str]:
    """Why these kernels cannot run the problem; empty when they can."""
    reasons = library_obstacles(problem)
    if problem.op != "multi_lora_fwd":
        reasons.append("forward only: there is no CUDA C++ kernel for backward")
    if problem.rank > _MAX_RANK:
        reasons.append(f"rank {problem.rank} is above {_MAX_RANK}")
    if problem.dropout:
        reasons.append("no dropout: the kernels are for inference")
    return reasons


def priority(problem: Any) -> int:
    """Never chosen by itself: these kernels have not run on a GPU yet."""
    return 0


@cache
def _operator() -> Any:
    return torch.ops.pelt_fast_cuda.multi_lora_fwd.default  # `unsupported` has loaded the library


def _splits(in_features: int) -> int:
    """How many blocks share K, from K alone: a token's sums have one order in whatever batch."""
    passes = max(-(-in_features // (_MAX_SPLITS * _PASS_COLUMNS)), 1)
    return max(-(-in_features // (passes * _PASS_COLUMNS)), 1)


def multi_lora_fwd(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    base: Sequence[Tensor | None],
    plan: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scaling: Sequence[Tensor],
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    inplace: bool,
) -> tuple[list[Tensor], Tensor]:
    """x (T, K) -> y of each projection (T, N), and s (T, sum of R), the shrink without its scale."""
    tokens, in_features = x.shape
    total = sum([a.shape[1] for a in lora_a])
    s = x.new_empty((tokens, total))
    partials = x.new_empty((_splits(in_features), tokens, total), dtype=torch.float32)
    nothing = x.new_empty(0)
    before = [nothing if b is None else b for b in base]
    y = before if inplace else [x.new_empty((tokens, b.shape[1])) for b in lora_b]
    _, perm, _, tiles = plan[:4]
    factors = None if row_scale is None else row_scale.float().contiguous()
    _operator()(
        x,
        list(lora_a),
        list(lora_b),
        before,
        perm,
        tiles,
        [r.contiguous() for r in ranks],
        [c.contiguous() for c in scaling],
        factors,
        partials,
        s,
        y,
        inplace,
    )
    return y, s


def multi_lora_bwd(*_: Any) -> Any:
    """`unsupported` says so before anybody comes here."""
    raise NotImplementedError("there is no CUDA C++ kernel for the backward of multi-LoRA")
