"""`bottleneck_block`: the `adapters` library's own block, under every flag that it has."""

import itertools

import pytest
import torch
from torch import nn

from pelt_fast import functional
from pelt_fast.nn import bottleneck_block as module
from pelt_fast.nn.bottleneck_block import (
    BottleneckSpec,
    adapter_gate,
    bottleneck_block,
    bottleneck_core,
    resolve_activation,
)

modeling = pytest.importorskip("adapters.methods.modeling")
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig

D, M = 12, 5
FLAGS = ("original_ln_before", "original_ln_after", "ln_before", "ln_after")
SCALINGS = (-1.5, "learned", "channel")


class RMSNorm(nn.Module):
    """A norm of the model's that is no layernorm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, dtype=torch.float64))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def adapter_of(config, dtype=torch.float64):
    kind = modeling.ParallelAdapter if config.is_parallel else modeling.Adapter
    return randomised(kind("a", D, M, config).to(dtype))


def norm_of(kind):
    norms = {
        "layernorm": lambda: nn.LayerNorm(D, eps=1e-3),
        "rmsnorm": RMSNorm,
        "bare": lambda: nn.LayerNorm(D, elementwise_affine=False),
        "none": lambda: None,
    }
    norm = norms[kind]()
    return norm if norm is None else randomised(norm.double())


def spec_of(adapter, config):
    gate = adapter.gate if config.use_gating else None
    down = adapter.adapter_down[1 if config.ln_before else 0]
    return BottleneckSpec(
        down.weight,
        down.bias,
        adapter.adapter_up.weight,
        adapter.adapter_up.bias,
        resolve_activation(config.non_linearity),
        scaling=adapter.scaling,
        gate_weight=None if gate is None else gate.weight,
        gate_bias=None if gate is None else gate.bias,
        norm_before=getattr(adapter, "adapter_norm_before", None),
        norm_after=getattr(adapter, "adapter_norm_after", None),
        dropout=config.dropout,
        stochastic_depth=config.stochastic_depth,
        is_parallel=config.is_parallel,
        original_ln_before=config.original_ln_before,
        original_ln_after=config.original_ln_after,
        residual_before_ln=config.residual_before_ln,
        adapter_residual_before_ln=config.adapter_residual_before_ln,
    )


def library_block(adapter, o, x, layer_norm):
    h, _, residual = adapter.pre_forward(o, x, layer_norm)
    y = adapter(h, residual)[0]
    return adapter.post_forward(y, o, x, layer_norm)


def value_and_gradients(f, inputs, modules):
    inputs = [t.detach().requires_grad_() for t in inputs]
    parameters = [p for m in modules if m is not None for p in m.parameters()]
    y = f(*inputs)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return y, *torch.autograd.grad((y * weight).sum(), [*inputs, *parameters], allow_unused=True)


def compare(config, layer_norm, inputs):
    adapter = adapter_of(config)
    spec = spec_of(adapter, config)
    modules = [adapter, layer_norm]
    try:
        expected = value_and_gradients(
            lambda o, x: library_block(adapter, o, x, layer_norm), inputs, modules
        )
    except (TypeError, UnboundLocalError):
        with pytest.raises(ValueError, match="expected"):
            bottleneck_block(spec, *inputs, layer_norm, False)
        return False
    actual = value_and_gradients(
        lambda o, x: bottleneck_block(spec, o, x, layer_norm, False), inputs, modules
    )
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9, msg=lambda m: f"{config}\n{m}")
    return True


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [torch.randn(2, 3, D, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "bare", "none"])
@pytest.mark.parametrize(
    ("is_parallel", "residual_before_ln"),
    [(False, True), (False, False), (False, "post_add"), (True, True)],
)
def test_every_flag_of_the_library(is_parallel, residual_before_ln, norm, inputs):
    scalings = itertools.cycle(SCALINGS)
    ran = 0
    for values in itertools.product([False, True], repeat=6):
        flags = dict(zip((*FLAGS, "adapter_residual_before_ln", "use_gating"), values, strict=True))
        config = BnConfig(
            True,
            True,
            2,
            "gelu",
            is_parallel=is_parallel,
            residual_before_ln=residual_before_ln,
            scaling=next(scalings),
            **flags,
        )
        ran += compare(config, norm_of(norm), inputs)
    assert ran == {"post_add": 0 if norm == "none" else 32}.get(residual_before_ln, 64)
