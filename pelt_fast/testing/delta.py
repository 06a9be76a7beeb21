"""Diff pruning as a test judges it: inputs, the exact answer in fp64, and how far each element may be off.

The bound follows from the arithmetic, element by element, with a the unit roundoff of the accumulator (fp32; fp64 for
fp64) and u that of the result's dtype: exp errs by four units, the odds of the noise by three, their product by one, so
a sigmoid s errs by 8 a s (1 - s), its stretched value by that times the stretch plus 4 a of what is added, and so on.
A gate so near 0 or 1 that this may cut it, or not, has all of its slope as the bound of its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..random import philox_odds

Results = dict[str, Tensor]


@dataclass(frozen=True)
class DiffInputs:
    """The tensors of one ``diff_pruning_weight``, the seed of its noise, and the gradients that come back to it."""

    weight: Tensor
    diff: Tensor
    log_alpha: Tensor
    scale: Tensor | None
    seed: Tensor | None
    dmade: Tensor
    dcount: Tensor
    lower: float = -1.5
    upper: float = 1.5

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        delta_dtype: torch.dtype | None = None,
        scaled: bool = True,
        noisy: bool = True,
        stretch: tuple[float, float] = (-1.5, 1.5),
        seed: int = 0,
    ) -> DiffInputs:
        """Draws them; log_alpha wide enough that gates are closed, open and in between."""
        generator = torch.Generator().manual_seed(seed)

        def draw(std: float, dtype: torch.dtype | None = dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, generator=generator) * std

        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            draw(1.0),
            draw(0.5, delta_dtype or dtype),
            draw(2.0, delta_dtype or dtype),
            torch.tensor(0.75, dtype=wide) if scaled else None,
            torch.tensor([seed + 17]) if noisy else None,
            draw(1.0),
            torch.tensor(0.3, dtype=wide),
            *stretch,
        )


def exact(inputs: DiffInputs) -> tuple[Results, Results]:
    """Results by name in fp64, and the bound of each."""
    double = [t.detach().double() for t in (inputs.diff, inputs.log_alpha)]
    diff, alpha = (t.requires_grad_() for t in double)
    scale = torch.ones((), dtype=torch.float64) if inputs.scale is None else inputs.scale.double()
    scale.requires_grad_()
    weight, lower, upper = inputs.weight.double(), inputs.lower, inputs.upper
    odds = None
    if inputs.seed is not None:
        odds = philox_odds(inputs.seed, weight.shape, torch.float64)
    out, count = reference.diff_pruning_weight(
        weight, diff, alpha, scale=scale, odds=odds, lower=lower, upper=upper
    )
    dmade = inputs.dmade.double()
    ddiff, dalpha, dscale = torch.autograd.grad(
        (out, count), (diff, alpha, scale), (dmade, inputs.dcount.double())
    )
    results = {
        "out": out,
        "count": count,
        "diff": ddiff,
        "log_alpha": dalpha,
        "scale": dscale,
    }
    with torch.no_grad():
        wide = torch.promote_types(inputs.weight.dtype, torch.float32)
        a = torch.finfo(wide).eps / 2
        u, u_delta = (torch.finfo(t.dtype).eps / 2 for t in (inputs.weight, inputs.diff))
        width = upper - lower
        s = torch.sigmoid(alpha if odds is None else alpha - odds.log())
        open_ = torch.sigmoid(alpha - math.log(-lower / upper))
        flat, open_flat = s * (1 - s), open_ * (1 - open_)
        stretched = s * width + lower
        off = a * (8 * flat * width + 4 * (s * width + abs(lower)))  # of the gate
        inside = (stretched >= -off) & (stretched <= 1 + off)
        edge = ((stretched.abs() <= off) | ((stretched - 1).abs() <= off)).double()
        off, z = off * inside, stretched.clamp(0, 1)
        slope_off = width * a * (8 * flat + 4 * flat + 2 * s) * inside + edge * width * flat
        through = (dmade * diff * scale).abs()
        n = math.sqrt(max(1, out.numel()))
        bounds = {
            "out": u * out.abs() + (diff * scale).abs() * off + 4 * a * (weight.abs() + out.abs()),
            "count": a * (12 * open_.sum() + n * open_.sum()),
            "diff": u_delta * ddiff.abs() + (dmade * scale).abs() * off + 4 * a * ddiff.abs(),
            "log_alpha": u_delta * dalpha.abs()
            + through * slope_off
            + 8 * a * through * width * flat
            + inputs.dcount.double() * a * (12 * open_flat + 2 * open_),
            "scale": ((dmade * diff).abs() * (off + (4 + n) * a * z)).sum(),
        }
    return {k: v.detach() for k, v in results.items()}, bounds


def wrong(actual: Results, inputs: DiffInputs) -> list[str]:
    """What is further off than it may be, in words; ``actual`` may leave results out."""
    expected, bounds = exact(inputs)
    found = []
    for name, value in actual.items():
        if value.shape != expected[name].shape:
            found.append(
                f"{name}: shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
            )
            continue
        over = (value.double() - expected[name]).abs() - bounds[name]
        if value.numel() and not bool((over <= 0).all()):
            found.append(f"{name}: off by {over.max().item():.3g} more than allowed")
    return found
