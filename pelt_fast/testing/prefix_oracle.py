"""How far from the oracle attention over a prefix may be: a consequence of dtypes and shapes, never a constant.

As in ``tolerance.py`` a result passes when, against ``pelt_fast.reference`` in fp64 on the same numbers,

    error <= 2 · (error of the eager composition in the same dtypes) + bound

for the largest error and for the mean; eager is torch's attention of concatenated keys, values and mask. With u the
unit roundoff of the dtype and a that of the accumulator, the bound of an element Σ_j p_j v_j is the sum of

1. ``2 u · |result|``: the result is rounded, and once more where the prefix was folded into what was rounded already;
2. ``Σ_j p_j |v_j| · (2 δ + (√K + 8) · a)``: a score s_j that is wrong by δ_j makes p_j wrong by that, relatively, and
   so does the denominator; K terms are added up, and an exponential errs by a few a. A score has a sum of D terms and
   is added to a mask: δ = a · max_j (√D · scale · Σ_d |q_d k_jd| + |s_j|).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .prefix_workloads import PrefixInputs
from .tolerance import Deviation, compare


def deviation(actual: Tensor, inputs: PrefixInputs) -> Deviation:
    """Compares a result with the oracle."""
    result, bound = _exact(inputs)
    bounds = {"y": (bound, bound)}
    (found,) = compare({"y": actual}, {"y": result}, {"y": eager(inputs)}, bounds)
    return found


def eager(inputs: PrefixInputs) -> Tensor:
    """What people write."""
    query, key, value, prefix_key, prefix_value = _gated(inputs, query_dtype(inputs))
    mask = additive_mask(inputs, query_dtype(inputs))
    if mask is not None:
        mask = F.pad(mask, (prefix_key.shape[2], 0))
    keys, values = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
    return F.scaled_dot_product_attention(query, keys, values, mask)


def query_dtype(inputs: PrefixInputs) -> torch.dtype:
    """The one that is computed in."""
    return inputs.query.dtype


def additive_mask(inputs: PrefixInputs, dtype: torch.dtype) -> Tensor | None:
    """Of the sequence, with -∞ where a key is not seen; None where all are."""
    mask = inputs.options.get("attn_mask")
    shape = (*inputs.query.shape[:3], inputs.key.shape[2])
    if inputs.options.get("is_causal"):
        mask = torch.ones(shape, dtype=torch.bool, device=inputs.query.device).tril()
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.to(dtype).expand(shape)


def _gated(inputs: PrefixInputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    query, key, value, prefix_key, prefix_value = (t.to(dtype) for t in inputs.args)
    gate = inputs.options.get("gate")
    if gate is not None:
        gate = gate.to(dtype)[:, :, None, None]
        prefix_key, prefix_value = prefix_key * gate[:, :1], prefix_value * gate[:, -1:]
    shape = (query.shape[0], -1, -1, -1)
    return query, key, value, prefix_key.expand(shape), prefix_value.expand(shape)


def _exact(inputs: PrefixInputs) -> tuple[Tensor, Tensor]:
    query, key, value, prefix_key, prefix_value = _gated(inputs, torch.float64)
    scale, mask = 1 / math.sqrt(query.shape[3]), additive_mask(inputs, torch.float64)
    tensors = (query, key, value, prefix_key, prefix_value)
    result = reference.prefix_attention(*tensors, scale=scale, mask=mask)
    keys = torch.cat([prefix_key, key], 2)
    size = reference.prefix_attention(
        query, key, value.abs(), prefix_key, prefix_value.abs(), scale=scale, mask=mask
    )
    dtype = query_dtype(inputs)
    u = torch.finfo(dtype).eps / 2
    a = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    products = scale * (query.abs() @ keys.abs().mT)
    score = products.amax(-1, keepdim=True) * (math.sqrt(query.shape[3]) + 1)
    if mask is not None:
        score = score + mask.masked_fill(mask.isinf(), 0).abs().amax(-1, keepdim=True)
    share = 2 * a * score + (math.sqrt(keys.shape[2]) + 8) * a
    return result, 2 * u * result.abs() + size * share
