"""Who runs in a row: attention without a prefix, concatenation by hand, ours per backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.inputs import Inputs
from pelt_fast.testing.inputs import draw as drawn_tensor

from ..case import DTYPES
from ..contender import BACKENDS, Contender, backend_in, leaves_of, recorded, what_runs
from .cases import HEAD_DIM, HEADS, PrefixCase

NAMES = ("plain", "eager", "ours", *(f"ours[{name}]" for name in BACKENDS))


@dataclass(frozen=True)
class AttentionInputs(Inputs):
    """x is the query; the prefix is one for the batch, of stride 0."""

    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    mask: Tensor | None


def draw(case: PrefixCase, device: torch.device) -> AttentionInputs:
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]

    def states(batch: int, length: int) -> Tensor:
        shape = (batch, length, HEADS, HEAD_DIM)
        rows = drawn_tensor(shape, 1.0, "contiguous", dtype, device, generator)
        return rows.transpose(1, 2)

    mask = None
    if case.masked:
        mask = torch.zeros(case.batch, 1, case.queries, case.keys, dtype=dtype, device=device)
        mask[..., case.keys * 3 // 4 :] = torch.finfo(dtype).min
    query = states(case.batch, case.queries)
    keys = [states(case.batch, case.keys) for _ in range(2)]
    prefix = [states(1, case.prefix).expand(case.batch, -1, -1, -1) for _ in range(2)]
    return AttentionInputs(query, torch.zeros_like(query), *keys, *prefix, mask)


def build(name: str, case: PrefixCase, inputs: AttentionInputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    leaves = leaves_of(inputs, ())
    i, ran = leaves, "torch"
    prefix = (i.prefix_key, i.prefix_value)

    def forward() -> Tensor:
        if name == "plain":
            return F.scaled_dot_product_attention(i.x, i.key, i.value, i.mask)
        if name == "eager":
            return concatenated(i)
        return PF.prefix_attention(i.x, i.key, i.value, *prefix, attn_mask=i.mask, backend=backend)

    backend = backend_in(name)
    if name.startswith("ours"):
        arguments = (i.x, i.key, i.value, *prefix)
        explanation = pelt_fast.explain(
            "prefix_attention", *arguments, attn_mask=i.mask, backend=backend
        )
        ran = what_runs(explanation, case)
    return Contender(name, leaves, recorded(case, forward), {}, ran)


def concatenated(i: AttentionInputs) -> Tensor:
    """As `adapters` writes it."""
    key, value = torch.cat([i.prefix_key, i.key], 2), torch.cat([i.prefix_value, i.value], 2)
    mask = i.mask
    if mask is not None:
        seen = torch.ones(*mask.shape[:3], i.prefix_key.shape[2]).to(mask.device, mask.dtype)
        mask = torch.cat([1.0 - seen, mask], -1)
    return F.scaled_dot_product_attention(i.x, key, value, mask)
