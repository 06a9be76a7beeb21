"""An AdapterFusion of plain bottleneck adapters as the `adapters` library (1.3.0) computes it, in one fused call.

With o = hidden_states, x = input_tensor, LN = layer_norm and the flags of the last adapter, which count for all:

    sequential  h = LN(o + x) with original_ln_before, else o (no LN: o + x without the LN; no x: o)
                r = o, or o + x for residual_before_ln="post_add", or h for False
                u = o with query_before_ln, else h
    parallel    h = r = u = x
    c = fusion(h, u) + r;  with residual_before r is added to what each adapter gives, and not to c
    parallel    c = c + o
    y = LN(c + x) with original_ln_after (no LN: c + x), else c

What the library's ``Fuse`` takes of an adapter is its up projection times its scaling: no dropout, no gate, no
layernorm of its own and no residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .. import functional
from ..functional.fusion_fold import Attention
from .bottleneck_block import _fuses, _norm, _sum


class FusionSpec(NamedTuple):
    """Tensors and flags of one fusion; d features, m_n bottlenecks of N adapters."""

    down_weights: Sequence[Tensor]  # (m_n, d)
    down_biases: Sequence[Tensor | None]  # (m_n,)
    up_weights: Sequence[Tensor]  # (d, m_n)
    up_biases: Sequence[Tensor | None]  # (d,)
    scaling: Sequence[float | Tensor]  # a tensor: (1,) or (d,)
    activation: str  # a kernel's name
    attention: Attention  # None in it: the flag is off
    temperature: float = 1.0  # of this call
    dropout: float = 0.0  # of the scores
    query_before_ln: bool = False
    residual_before: bool = False
    is_parallel: bool = False  # from here on the last adapter's
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True


def fusion_block(
    spec: FusionSpec,
    hidden_states: Tensor,
    input_tensor: Tensor | None,
    layer_norm: nn.Module | None,
    training: bool,
    *,
    after: bool = True,
) -> tuple[Tensor, Tensor]:
    """The library's ``pre_forward``, ``BertFusion.forward`` and ``post_forward`` around it.

    Args:
        spec: the fusion.
        hidden_states: (..., d), the sub-layer's output.
        input_tensor: (..., d), the residual stream before the sub-layer, or None where the model has none.
        layer_norm: the model's own norm after the sub-layer, or None where the model or a hook applies none.
        training: whether dropout acts.
        after: whether ``post_forward`` is wanted too.

    Returns:
        y (..., d), and the attention (..., N), which carries no gradient.

    Raises:
        ValueError: flags ask for an input_tensor or a layer_norm that is None.
    """
    o, x = hidden_states, input_tensor
    _check(spec, x, layer_norm, after)
    inputs, pre, residuals = _before(spec, o, x, layer_norm)
    value_residual = None
    if spec.residual_before:
        value_residual, residuals = _sum(residuals), []
    post = None
    if after and spec.is_parallel:
        residuals = [*residuals, o]
    if after and spec.original_ln_after and x is not None:
        residuals, post = [*residuals, x], layer_norm
    fused = post is None or _fuses(post, o)
    y, p = functional.adapter_fusion(
        inputs[0],
        spec.down_weights,
        spec.down_biases,
        spec.up_weights,
        spec.up_biases,
        scaling=spec.scaling,
        activation=spec.activation,
        **spec.attention._asdict(),
        query=o if spec.query_before_ln and not spec.is_parallel else None,
        temperature=spec.temperature,
        value_residual=value_residual,
        residual=residuals or None,
        skip=inputs[1] if len(inputs) == 2 else None,
        dropout_p=spec.dropout,
        training=training,
        return_attention=True,
        **_norm("pre_ln_", pre),
        **(_norm("ln_", post) if fused else {}),
    )
    return (y if post is None or fused else post(y)), p


def _check(spec: FusionSpec, x: Tensor | None, layer_norm: nn.Module | None, after: bool) -> None:
    """Combinations in which the library itself fails, in words."""
    sums = (after and spec.original_ln_after) or (
        spec.original_ln_before and layer_norm is not None
    )
    if x is None and (spec.is_parallel or sums):
        flag = "is_parallel" if spec.is_parallel else "original_ln_before or original_ln_after"
        raise ValueError(f"input_tensor is None; expected a tensor, since {flag} is set")
    if spec.is_parallel or isinstance(spec.residual_before_ln, bool):
        return
    if spec.residual_before_ln != "post_add":
        raise ValueError(
            f"residual_before_ln is {spec.residual_before_ln!r}; expected True, False or 'post_add'"
        )
    if not spec.original_ln_before or layer_norm is None:
        raise ValueError(
            "residual_before_ln is 'post_add'; expected original_ln_before and a layer_norm beside it"
        )


def _before(
    spec: FusionSpec, o: Tensor, x: Tensor | None, layer_norm: nn.Module | None
) -> tuple[list[Tensor], nn.Module | None, list[Tensor]]:
    """pre_forward: the adapters' inputs (to be summed), the norm of that sum, the residuals."""
    if spec.is_parallel:
        assert x is not None
        return [x], None, [x]
    inputs = [o, x] if spec.original_ln_before and x is not None else [o]
    before = inputs if spec.residual_before_ln == "post_add" else [o]
    if not spec.original_ln_before or layer_norm is None:
        return inputs, None, before if spec.residual_before_ln else inputs
    if spec.residual_before_ln and _fuses(layer_norm, o):
        return inputs, layer_norm, before
    total = _sum(inputs)
    h = layer_norm(total)
    if not spec.residual_before_ln:
        return [h], None, [h]
    return [h], None, [total] if spec.residual_before_ln == "post_add" else [o]
