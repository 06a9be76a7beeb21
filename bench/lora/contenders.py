"""Who runs in a row: the frozen linear, PEFT in its forms, addmm by hand, ours per backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.workloads import LoRAInputs

from ..case import DTYPES
from ..contender import (
    BACKENDS,
    Contender,
    NotHere,
    backend_in,
    compiling,
    differentiable,
    leaves_of,
    recorded,
    what_runs,
)
from .cases import DROPOUT, RANK, SCALING, LoRACase

FORMS = ("base", "dropout", "fp32")
"""Adapter in the base dtype; the same with dropout; an fp32 adapter over a half-precision base,
which is PEFT's default."""
NAMES = (
    "frozen",
    *(f"peft_{form}" for form in FORMS),
    "peft_compiled",
    "addmm",
    *(f"ours_{form}" for form in FORMS),
    *(f"ours[{backend}]" for backend in BACKENDS),
)


def draw(case: LoRACase, device: torch.device) -> LoRAInputs:
    return case.workload.make(DTYPES[case.dtype], device)


def build(name: str, case: LoRACase, drawn: LoRAInputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    form = next((form for form in FORMS if name.endswith("_" + form)), "base")
    inputs = _in_form(drawn, form, case)
    if name == "frozen":
        names = ("x",) if case.train else ()
        return differentiable(name, case, inputs, names, _frozen, "torch")
    if name == "addmm":
        return differentiable(name, case, inputs, _wanted(inputs, case), _addmm, "torch")
    if name.startswith("peft_"):
        return _peft(name, form, case, inputs)
    return _ours(name, form, case, inputs)


def _in_form(inputs: LoRAInputs, form: str, case: LoRACase) -> LoRAInputs:
    if form == "dropout":
        if not case.train:
            raise NotHere("no dropout in decoding")
        return replace(inputs, dropout_p=(DROPOUT,))
    if form == "fp32":
        if case.dtype == "fp32":
            raise NotHere("the base is fp32 already")
        # The same numbers in a wider dtype, so that every form is compared with one exact result.
        return inputs.map(lambda name, t: t.float() if name.startswith("lora_") else t)
    return inputs


def trained(inputs: LoRAInputs) -> tuple[str, ...]:
    return ("x", "lora_a.0", "lora_b.0")


def _wanted(inputs: LoRAInputs, case: LoRACase) -> tuple[str, ...]:
    return trained(inputs) if case.train else ()


def _frozen(leaves: LoRAInputs) -> Tensor:
    return F.linear(leaves.x, leaves.weight, leaves.bias)


def peft_linear(inputs: LoRAInputs) -> nn.Module:
    """PEFT's own layer, made by PEFT, holding the numbers of ``inputs``."""
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    out_features, in_features = inputs.weight.shape
    model.proj = nn.Linear(
        in_features, out_features, dtype=inputs.weight.dtype, device=inputs.weight.device
    )
    config = LoraConfig(
        r=RANK,
        lora_alpha=round(SCALING * RANK),
        lora_dropout=inputs.dropout_p[0],
        target_modules=["proj"],
    )
    wide = inputs.lora_a[0].dtype != inputs.weight.dtype
    layer = get_peft_model(model, config, autocast_adapter_dtype=wide).base_model.model.proj
    with torch.no_grad():
        layer.base_layer.weight.copy_(inputs.weight)
        layer.base_layer.bias.copy_(inputs.bias)
        layer.lora_A["default"].weight.copy_(inputs.lora_a[0])
        layer.lora_B["default"].weight.copy_(inputs.lora_b[0])
    if layer.lora_A["default"].weight.dtype != inputs.lora_a[0].dtype:
        raise NotHere(f"PEFT made a {layer.lora_A['default'].weight.dtype} adapter")
    return layer.train()


def _peft(name: str, form: str, case: LoRACase, inputs: LoRAInputs) -> Contender:
    layer: Any = peft_linear(inputs)
    call, ran = layer, "torch"
    if name == "peft_compiled":
        compiling(case)
        call, ran = torch.compile(layer, dynamic=False), "inductor"
    leaves = leaves_of(inputs, ("x",) if case.train else ())
    x = leaves.x
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wrt = {"x": x, "lora_a.0": a, "lora_b.0": b} if case.train else {}
    forward = recorded(case, lambda: call(x))
    return Contender(name, leaves, forward, wrt, ran, layer, form)


class _AddmmLoRA(torch.autograd.Function):
    """What one writes by hand for speed: the rank-r products go into the big ones in place."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
        y = F.linear(x, weight, bias)
        s = x @ lora_a.T
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.scaling = scaling
        return y.addmm_(s, lora_b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[no-untyped-def]
        x, weight, lora_a, lora_b, s = ctx.saved_tensors
        ds = (dy @ lora_b).mul_(ctx.scaling)
        db = (dy.T @ s).mul_(ctx.scaling)
        da = ds.T @ x
        dx = (dy @ weight).addmm_(ds, lora_a)
        return dx, None, None, da, db, None


def _addmm(leaves: LoRAInputs) -> Tensor:
    return _AddmmLoRA.apply(  # type: ignore[no-any-return, no-untyped-call]
        leaves.x, leaves.weight, leaves.bias, leaves.lora_a[0], leaves.lora_b[0], leaves.scaling[0]
    )


def _ours(name: str, form: str, case: LoRACase, inputs: LoRAInputs) -> Contender:
    backend = backend_in(name)
    explanation = pelt_fast.explain("lora_linear", *inputs.args, **inputs.kwargs, backend=backend)
    ran = what_runs(explanation, case)
    p, training = inputs.dropout_p[0], any(inputs.dropout_p)

    def function(leaves: LoRAInputs) -> Tensor:
        x, weight, bias, (a,), (b,), (scaling,) = leaves.args
        return PF.lora_linear(
            x, weight, bias, a, b, scaling, dropout_p=p, training=training, backend=backend
        )

    return differentiable(name, case, inputs, _wanted(inputs, case), function, ran, form)
