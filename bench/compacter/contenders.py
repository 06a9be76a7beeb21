"""Who runs in a row: the layernorm alone, the library's composition, ours per backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing import compacter_oracle
from pelt_fast.testing.compacter_workloads import CompacterInputs

from ..case import DTYPES
from ..contender import BACKENDS, Contender, backend_in, differentiable, what_runs
from .cases import CompacterCase

NAMES = ("ln", "eager", "ours", *(f"ours[{name}]" for name in BACKENDS))


def draw(case: CompacterCase, device: torch.device) -> CompacterInputs:
    return case.workload.make(DTYPES[case.dtype], device)


def trained(inputs: CompacterInputs) -> tuple[str, ...]:
    """Everything."""
    return tuple(name for name, _ in inputs.named_tensors() if name != "dy")


def build(name: str, case: CompacterCase, drawn: CompacterInputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    everything = trained(drawn) if case.train else ()
    if name == "ln":
        names = ("x", "skip", "ln_weight", "ln_bias") if case.train else ()
        return differentiable(name, case, drawn, names, _layernorm, "torch")
    if name == "eager":
        return differentiable(name, case, drawn, everything, compacter_oracle.composition, "torch")
    backend = backend_in(name)
    explanation = pelt_fast.explain("compacter", *drawn.args, **drawn.kwargs, backend=backend)

    def function(leaves: CompacterInputs) -> Tensor:
        return PF.compacter(*leaves.args, **leaves.kwargs, backend=backend)

    ran = what_runs(explanation, case)
    return differentiable(name, case, drawn, everything, function, ran)


def _layernorm(i: CompacterInputs) -> Tensor:
    """What stands there without an adapter."""
    assert i.skip is not None
    return F.layer_norm(i.x + i.skip, i.x.shape[-1:], i.ln_weight, i.ln_bias, i.eps)
