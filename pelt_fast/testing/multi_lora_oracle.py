"""Two yardsticks for one `multi_lora` call: the exact answer, and what eager PyTorch makes of it.

Results go by name: ``y``, the outputs side by side, and the gradient of each tensor under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..random import new_seed, philox_mask
from .multi_lora_workloads import MultiLoRAInputs
from .oracle import Masks, Results, run


def masks(inputs: MultiLoRAInputs, seed: Tensor | None) -> list[Tensor | None]:
    """The dropout mask (T, in) of each projection, True where an element is kept."""
    shape = (inputs.tokens, inputs.x.shape[-1])
    return [
        philox_mask(seed, shape, inputs.dropout_p, i) if seed is not None and inputs.dropout_p else None
        for i in range(len(inputs.lora_a))
    ]  # fmt: skip


def joined(y: Tensor | Sequence[Tensor]) -> Tensor:
    """The outputs of the projections side by side."""
    return y if isinstance(y, Tensor) else torch.cat(list(y), -1)


def run_with_masks(
    function: Callable[[MultiLoRAInputs], Tensor],
    inputs: MultiLoRAInputs,
    wanted: Iterable[str] | None = None,
    seed: int = 0,
) -> tuple[Results, list[Tensor | None]]:
    """`run` after ``torch.manual_seed(seed)``, and the dropout masks that ``function`` has drawn."""
    torch.manual_seed(seed)
    keep = masks(inputs, new_seed(inputs.x.device))
    torch.manual_seed(seed)
    return run(function, inputs, wanted), keep


def operands(inputs: MultiLoRAInputs) -> tuple[Any, ...]:
    """What the operators and the backends take between x and the dropout: x and base as rows."""
    n, device = len(inputs.lora_a), inputs.x.device
    wide = torch.promote_types(inputs.x.dtype, torch.float32)
    ranks = [torch.tensor(r, dtype=torch.int32, device=device) for r in inputs.used_ranks]
    scaling = [torch.tensor(s, dtype=wide, device=device) for s in inputs.scaling]
    base = [None if b is None else as_rows(b) for b in inputs.base]
    scales = inputs.row_scales
    lists = (list(inputs.lora_a), list(inputs.lora_b), base or [None] * n, inputs.plan.arrays)
    return (as_rows(inputs.x), *lists, ranks, scaling, scales)


def as_rows(t: Tensor) -> Tensor:
    """(..., features) as (T, features) with a last stride of 1."""
    rows = t.reshape(t[..., 0].numel(), t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def run_backend(
    module: Any,
    inputs: MultiLoRAInputs,
    seed: Tensor | None = None,
    wanted: Iterable[str] | None = None,
) -> Results:
    """The two functions of a backend's module, called as the operators call them; ``row_scale`` of token cases only."""
    names = [name for name, _ in inputs.named_tensors() if name != "dy"]
    wanted = names if wanted is None else list(wanted)
    x, lora_a, lora_b, base, *rest = operands(inputs)
    y, s = module.multi_lora_fwd(x, lora_a, lora_b, base, *rest, inputs.dropout_p, seed, False)
    dy = [as_rows(t) for t in inputs.dy.split(inputs.outs, -1)]
    heads = [name.partition(".")[0] for name in wanted]
    needs = [name in heads for name in ("x", "lora_a", "lora_b", "row_scale")]
    dx, da, db, drow_scale = module.multi_lora_bwd(
        dy, x, lora_a, lora_b, s, *rest, inputs.dropout_p, seed, *needs
    )
    found = {"x": dx, "row_scale": drow_scale}
    for i, gradient in enumerate(dy):
        found[f"base.{i}"] = gradient
        found[f"lora_a.{i}"] = da[i] if da else None
        found[f"lora_b.{i}"] = db[i] if db else None
    results = {"y": torch.cat(y, -1)}
    for name, tensor in inputs.named_tensors():
        if name in wanted and (gradient := found[name]) is not None:
            results[name] = gradient.reshape(tensor.shape).to(tensor.dtype)
    return results


def exact(inputs: MultiLoRAInputs, keep: Masks, wanted: Iterable[str] | None = None) -> Results:
    """The oracle: `pelt_fast.reference` and its autograd in fp64, on the very numbers of ``inputs``."""

    def function(leaves: MultiLoRAInputs) -> Tensor:
        if not leaves.tokens:
            return leaves.dy + 0 * _touched(leaves)
        x = leaves.x.reshape(leaves.tokens, -1)
        y = [
            reference.multi_lora(
                *(x, a, b, leaves.ids, ranks, scaling),
                base=None if base is None else base.reshape(leaves.tokens, -1),
                row_scale=leaves.row_scales,
                dropout_p=leaves.dropout_p,
                keep=mask,
            )
            for a, b, base, ranks, scaling, mask in zip(
                *(leaves.lora_a, leaves.lora_b, leaves.base, leaves.used_ranks, leaves.scaling),
                keep,
                strict=True,
            )
        ]
        return joined(y).reshape(leaves.dy.shape) + 0 * _touched(leaves)

    return run(function, inputs.map(lambda _, t: t.detach().double()), wanted)


def eager(inputs: MultiLoRAInputs, keep: Masks, wanted: Iterable[str] | None = None) -> Results:
    """PEFT's loop over the adapters of a batch in the dtypes of ``inputs``: `LoraLayer._mixed_batch_forward`.

    There all adapters of a layer are modules of their own; here they are the first ranks of the stacked ones.
    """

    def function(leaves: MultiLoRAInputs) -> Tensor:
        x, outputs = leaves.x.reshape(leaves.tokens, leaves.x.shape[-1]), []
        for i, (a, b, base) in enumerate(
            zip(leaves.lora_a, leaves.lora_b, leaves.base, strict=True)
        ):
            result = x.new_zeros(leaves.tokens, b.shape[1])
            if base is not None:
                result = base.reshape(result.shape)
            for g, rank in enumerate(leaves.used_ranks[i]):
                where = [t for t, adapter in enumerate(leaves.ids) if adapter == g]
                if not where or not rank:
                    continue
                index = torch.tensor(where, device=x.device)
                dropped, mask, p = x[index].to(a.dtype), keep[i], leaves.dropout_p
                if mask is not None:
                    dropped = dropped * mask[index] / (1 - p) if p < 1 else dropped * 0
                delta = F.linear(F.linear(dropped, a[g, :rank]), b[g, :, :rank])
                delta = delta * leaves.scaling[i][g]
                if leaves.row_scales is not None:
                    delta = delta * leaves.row_scales[index, None]
                result = result.index_add(0, index, delta.to(result.dtype))
            outputs.append(result)
        return joined(outputs).reshape(leaves.dy.shape) + 0 * _touched(leaves)

    return run(function, inputs, wanted)


def _touched(leaves: MultiLoRAInputs) -> Tensor:
    """A zero that makes every tensor a part of the graph, whether a token needs it or not."""
    tensors = [t for name, t in leaves.named_tensors() if name != "dy"]
    return torch.stack([t.unsqueeze(0)[:0].sum().to(leaves.x.dtype) for t in tensors]).sum()
