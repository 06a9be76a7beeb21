"""Two yardsticks for one `adapter_fusion` call: the exact answer, and what eager PyTorch makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..random import new_seed, philox_mask
from .adapter_oracle import EAGER_ACTIVATIONS
from .fusion_workloads import FusionInputs
from .oracle import Results, run


def mask(inputs: FusionInputs, seed: Tensor | None) -> Tensor | None:
    """The dropout mask (T, N) of the scores, True where one is kept."""
    if seed is None or inputs.dropout_p == 0:
        return None
    return philox_mask(seed, (inputs.tokens, len(inputs.down)), inputs.dropout_p)


def run_with_mask(
    function: Callable[[FusionInputs], Tensor],
    inputs: FusionInputs,
    wanted: Iterable[str] | None = None,
    seed: int = 0,
) -> tuple[Results, Tensor | None]:
    """`run` after ``torch.manual_seed(seed)``, and the dropout mask that ``function`` has drawn."""
    torch.manual_seed(seed)
    keep = mask(inputs, new_seed(inputs.x.device))
    torch.manual_seed(seed)
    return run(function, inputs, trained(inputs) if wanted is None else wanted), keep


def trained(inputs: FusionInputs) -> list[str]:
    """Everything that gets a gradient: a key's bias does under dropout alone, else it is nothing but rounding."""
    names = [name for name, _ in inputs.named_tensors() if name != "dy"]
    return names if inputs.dropout_p > 0 else [name for name in names if name != "key_bias"]


def as_rows(inputs: FusionInputs) -> FusionInputs:
    """The same call with x, skip, query, value_residual and dy (T, d)."""
    shape = (inputs.tokens, inputs.x.shape[-1])
    rows = {
        name: value.reshape(shape)
        for name in ("x", "skip", "query", "value_residual", "dy")
        if (value := getattr(inputs, name)) is not None
    }
    return replace(inputs, **rows)


def exact(
    inputs: FusionInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> Results:
    """The oracle: `pelt_fast.reference` and its autograd in fp64, on the very numbers of ``inputs``."""

    def function(leaves: FusionInputs) -> Tensor:
        rows = as_rows(leaves)
        residuals = [t for t, added in _residuals(rows) if added and t is not None]
        y, _ = reference.adapter_fusion(
            *(rows.x, rows.down, rows.down_bias, rows.up, rows.up_bias),
            query_weight=rows.query_weight,
            query_bias=rows.query_bias,
            key_weight=rows.key_weight,
            key_bias=rows.key_bias,
            value_weight=rows.value_weight,
            activation=rows.activation,
            scalings=rows.scaling,
            query=rows.query,
            temperature=rows.temperature,
            value_residual=rows.value_residual,
            skip=rows.skip if rows.skip_in else None,
            pre_weight=rows.pre_weight,
            pre_bias=rows.pre_bias,
            pre_eps=rows.pre_eps,
            residual=sum(residuals[1:], residuals[0]) if residuals else None,
            ln_weight=rows.ln_weight,
            ln_bias=rows.ln_bias,
            eps=rows.eps,
            dropout_p=rows.dropout_p,
            keep=keep,
        )
        return y.reshape(leaves.x.shape)

    wanted = trained(inputs) if wanted is None else wanted
    return run(function, inputs.map(lambda _, t: t.detach().double()), wanted)


def eager(
    inputs: FusionInputs, keep: Tensor | None, wanted: Iterable[str] | None = None
) -> Results:
    """The composition of the `adapters` library in the dtypes of ``inputs``, operation for operation.

    ``Adapter.forward``'s up projections, `BertFusion.forward` and the block around them, which cast nothing:
    parameters wider than x are cast here.
    """

    def function(leaves: FusionInputs) -> Tensor:
        dtype, d = leaves.x.dtype, (leaves.x.shape[-1],)
        s = as_rows(leaves.map(lambda _, t: t.to(dtype)))
        v = s.x + s.skip if s.skip_in and s.skip is not None else s.x
        if s.pre_weight is not None:
            v = F.layer_norm(v, d, s.pre_weight, s.pre_bias, s.pre_eps)
        ups = []
        for down, down_bias, up, up_bias, scaling in zip(
            s.down, s.down_bias, s.up, s.up_bias, s.scaling, strict=True
        ):
            h = EAGER_ACTIVATIONS[s.activation](F.linear(v, down, down_bias))
            ups.append(F.linear(h, up, up_bias) * scaling)
        results = torch.stack(ups).permute(1, 0, 2)
        if s.value_residual is not None:
            results = results + s.value_residual[:, None, :].repeat(1, len(ups), 1)
        u = v if s.query is None else s.query
        query = u if s.query_weight is None else F.linear(u, s.query_weight, s.query_bias)
        key = results if s.key_weight is None else F.linear(results, s.key_weight, s.key_bias)
        value = results if s.value_weight is None else F.linear(results, s.value_weight)
        scores = torch.matmul(query.unsqueeze(1), key.transpose(-2, -1)).squeeze(1)
        if keep is not None:
            p = s.dropout_p
            scores = scores * keep / (1 - p) if p < 1 else scores * 0
        attention = torch.softmax(scores / s.temperature, -1)
        y = torch.matmul(attention.unsqueeze(1), value).squeeze(1)
        for term, added in _residuals(s):
            if added and term is not None:
                y = y + term
        if s.ln_weight is not None:
            y = F.layer_norm(y, d, s.ln_weight, s.ln_bias, s.eps)
        return y.reshape(leaves.x.shape)

    return run(function, inputs, trained(inputs) if wanted is None else wanted)


def _residuals(s: FusionInputs) -> tuple[tuple[Tensor | None, bool], ...]:
    return ((s.x, s.residual_x), (s.skip, s.residual_skip))
