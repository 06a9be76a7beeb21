"""Who runs in a row: the layernorm alone, the library's order by hand, ours per backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing import fusion_oracle
from pelt_fast.testing.fusion_workloads import FusionInputs
from pelt_fast.testing.tolerance import Deviation, compare

from ..case import DTYPES
from ..contender import (
    BACKENDS,
    Contender,
    backend_in,
    differentiable,
    what_runs,
)
from .cases import FusionCase

NAMES = ("ln", "eager", "ours", *(f"ours[{name}]" for name in BACKENDS))
FROZEN = ("down", "up")
"""The second stage of AdapterFusion trains the attention; a key's bias moves no score without dropout."""


def draw(case: FusionCase, device: torch.device) -> FusionInputs:
    return case.workload.make(DTYPES[case.dtype], device)


def trained(inputs: FusionInputs) -> tuple[str, ...]:
    """x, skip, the attention and the layernorms."""
    names = fusion_oracle.trained(inputs)
    return tuple(name for name in names if not name.startswith(FROZEN))


def build(name: str, case: FusionCase, drawn: FusionInputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    if name == "ln":
        names = ("x", "skip", "ln_weight", "ln_bias")
        return differentiable(name, case, drawn, names, _layernorm, "torch")
    if name == "eager":
        return differentiable(name, case, drawn, trained(drawn), _eager, "torch")
    backend = backend_in(name)
    explanation = pelt_fast.explain("adapter_fusion", *drawn.args, **drawn.kwargs, backend=backend)

    def ours(i: FusionInputs) -> Tensor:
        y = PF.adapter_fusion(*i.args, **i.kwargs, backend=backend)
        assert isinstance(y, Tensor)
        return y

    ran = what_runs(explanation, case)
    return differentiable(name, case, drawn, trained(drawn), ours, ran)


def deviations(results: dict[str, Tensor], inputs: FusionInputs, keep: Any) -> list[Deviation]:
    """Twice eager's error is all that is allowed."""
    wanted = [name for name in results if name != "y"]
    zero = torch.zeros((), dtype=torch.float64)
    return compare(
        results,
        fusion_oracle.exact(inputs, keep, wanted),
        fusion_oracle.eager(inputs, keep, wanted),
        dict.fromkeys(results, (zero, zero)),
    )


def _layernorm(i: FusionInputs) -> Tensor:
    assert i.skip is not None
    return F.layer_norm(i.x + i.skip, i.x.shape[-1:], i.ln_weight, i.ln_bias, i.eps)


def _eager(i: FusionInputs) -> Tensor:
    """``BertFusion.forward`` and the block around it, operation for operation."""
    assert i.skip is not None
    d = i.x.shape[-1:]
    v = F.layer_norm(i.x + i.skip, d, i.pre_weight, i.pre_bias, i.pre_eps)
    ups = [
        F.linear(F.relu(F.linear(v, down, down_bias)), up, up_bias)
        for down, down_bias, up, up_bias in zip(i.down, i.down_bias, i.up, i.up_bias, strict=True)
    ]
    results = torch.stack(ups).permute(1, 0, 2)
    assert i.query_weight is not None
    assert i.key_weight is not None
    assert i.value_weight is not None
    query = F.linear(v, i.query_weight, i.query_bias)
    key = F.linear(results, i.key_weight, i.key_bias)
    value = F.linear(results, i.value_weight)
    scores = torch.matmul(query.unsqueeze(1), key.transpose(-2, -1)).squeeze(1)
    attention = torch.softmax(scores, -1)
    context = torch.matmul(attention.unsqueeze(1), value).squeeze(1)
    return F.layer_norm(context + i.x + i.skip, d, i.ln_weight, i.ln_bias, i.eps)
