"""Who runs in a row: the frozen linear, PEFT in its forms, addmm by hand, ours per backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.workloads import LoRAInputs

from .cases import DROPOUT, DTYPES, RANK, SCALING, Case

FORMS = ("base", "dropout", "fp32")
"""Adapter in the base dtype; the same with dropout; an fp32 adapter over a half-precision base,
which is PEFT's default."""
BACKENDS = ("torch", "cpp", "triton")
NAMES = (
    "frozen",
    *(f"peft_{form}" for form in FORMS),
    "peft_compiled",
    "addmm",
    *(f"ours_{form}" for form in FORMS),
    *(f"ours[{backend}]" for backend in BACKENDS),
)


class NotHere(Exception):
    """A contender that does not apply to a row, or cannot run on this machine; says why."""


@dataclass
class Contender:
    """One way to compute a row, from the numbers in ``inputs``; see `timing.Step`."""

    name: str
    form: str
    inputs: LoRAInputs
    forward: Callable[[], Tensor]
    wrt: dict[str, Tensor]
    """What it differentiates by, under the names of `LoRAInputs`; empty: forward alone."""
    ran: str
    module: nn.Module | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is there before the step: keeping it for the backward costs nothing."""
        own = list(self.module.parameters()) if self.module is not None else []
        return [tensor for _, tensor in self.inputs.named_tensors()] + own

    @property
    def backward(self) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        if not self.wrt:
            return None
        sources, dy = list(self.wrt.values()), self.inputs.dy
        return lambda y: torch.autograd.grad(y, sources, dy)

    def run(self) -> dict[str, Tensor]:
        """y and the gradients by name."""
        y = self.forward()
        grads = self.backward(y) if self.backward is not None else ()
        return {"y": y.detach(), **dict(zip(self.wrt, grads, strict=True))}


def draw(case: Case, device: torch.device) -> LoRAInputs:
    return case.workload.make(DTYPES[case.dtype], device)


def build(name: str, case: Case, drawn: LoRAInputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    form = next((form for form in FORMS if name.endswith("_" + form)), "base")
    inputs = _in_form(drawn, form, case)
    if name == "frozen":
        return _frozen(case, inputs)
    if name == "addmm":
        return _differentiable(name, form, case, inputs, _addmm, "torch")
    if name == "peft_compiled":
        return _compiled(case, inputs)
    if name.startswith("peft_"):
        return _peft(name, form, case, inputs)
    backend = name[len("ours[") : -1] if name.startswith("ours[") else None
    return _ours(name, form, case, inputs, backend)


def _in_form(inputs: LoRAInputs, form: str, case: Case) -> LoRAInputs:
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


def _leaves(inputs: LoRAInputs, names: tuple[str, ...]) -> LoRAInputs:
    return inputs.map(lambda name, t: t.detach().requires_grad_(name in names))


def _trained(case: Case) -> tuple[str, ...]:
    return ("x", "lora_a.0", "lora_b.0") if case.train else ()


def _pick(leaves: LoRAInputs, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in leaves.named_tensors() if name in names}


def _recorded(case: Case, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    if case.train:
        return function

    def without_grad() -> Tensor:
        with torch.no_grad():
            return function()

    return without_grad


def _frozen(case: Case, inputs: LoRAInputs) -> Contender:
    names = ("x",) if case.train else ()
    leaves = _leaves(inputs, names)
    x, weight, bias = leaves.x, leaves.weight, leaves.bias
    forward = _recorded(case, lambda: F.linear(x, weight, bias))
    return Contender("frozen", "base", leaves, forward, _pick(leaves, names), "torch")


def _differentiable(
    name: str,
    form: str,
    case: Case,
    inputs: LoRAInputs,
    function: Callable[[LoRAInputs], Tensor],
    ran: str,
) -> Contender:
    names = _trained(case)
    leaves = _leaves(inputs, names)
    forward = _recorded(case, lambda: function(leaves))
    return Contender(name, form, leaves, forward, _pick(leaves, names), ran)


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


def _peft(
    name: str, form: str, case: Case, inputs: LoRAInputs, compiled: bool = False
) -> Contender:
    layer: Any = peft_linear(inputs)
    leaves = _leaves(inputs, ("x",) if case.train else ())
    call = torch.compile(layer, dynamic=False) if compiled else layer
    x = leaves.x
    wrt = {
        "x": x,
        "lora_a.0": layer.lora_A["default"].weight,
        "lora_b.0": layer.lora_B["default"].weight,
    }
    forward = _recorded(case, lambda: call(x))
    return Contender(
        name,
        form,
        leaves,
        forward,
        wrt if case.train else {},
        "inductor" if compiled else "torch",
        layer,
    )


def _compiled(case: Case, inputs: LoRAInputs) -> Contender:
    if not case.compiled:
        raise NotHere("torch.compile takes part in a few rows only: it compiles for half a minute")
    torch.compiler.reset()
    return _peft("peft_compiled", "base", case, inputs, compiled=True)


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


def _ours(name: str, form: str, case: Case, inputs: LoRAInputs, backend: str | None) -> Contender:
    explanation = pelt_fast.explain("lora_linear", *inputs.args, **inputs.kwargs, backend=backend)
    choices = explanation.choices if case.train else explanation.choices[:1]
    for choice in choices:
        if choice.chosen is None:
            raise NotHere(choice.error or "no backend can run it")
    ran = "+".join(dict.fromkeys(str(choice.chosen) for choice in choices))
    names = _trained(case)
    leaves = _leaves(inputs, names)
    x, weight, bias, (a,), (b,), (scaling,) = leaves.args
    p, training = inputs.dropout_p[0], any(inputs.dropout_p)

    def forward() -> Tensor:
        return PF.lora_linear(
            x, weight, bias, a, b, scaling, dropout_p=p, training=training, backend=backend
        )

    return Contender(name, form, leaves, _recorded(case, forward), _pick(leaves, names), ran)
