"""An accelerated model of the adapters library computes what the library computes: see parity.py."""

from __future__ import annotations

import copy
import math
import sys
import types
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters import ADAPTER_CONFIG_MAP, BnConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pelt_fast

from .adapters_models import HOULSBY, LAYERS, adapted, bottleneck_layers, is_adapter
from .conftest import ARCHITECTURES
from .parity import (
    AUTOCAST,
    BF16,
    FP32,
    PRECISIONS,
    Precision,
    Results,
    assert_as_accurate,
    one_step,
    pairs,
    three_steps,
)

MODELS = list(LAYERS)


def models(
    name: str, precision: Precision, *configs: Any
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The library's model, ours, and the same in fp64.

    The library's adapters have the base's dtype, as with others its forward raises outside autocast.
    """
    fp32 = precision.adapters_fp32
    fast = adapted(name, *configs, dtype=precision.weights, adapters_fp32=fp32)
    exact = copy.deepcopy(fast).double()
    plain = copy.deepcopy(fast)
    if not precision.autocast:
        plain.to(precision.weights)
    pelt_fast.accelerate(fast)
    return plain, fast, exact


def in_dtypes_of(results: Results, like: Results) -> Results:
    """The gradients of fp32 adapters are fp32, of those that the library needs in bf16 are bf16."""
    return {
        name: value.to(like[name].dtype) if is_adapter(name) else value
        for name, value in results.items()
    }


@pairs(MODELS, PRECISIONS, always=[FP32])
def test_outputs_and_every_gradient(name: str, precision: Precision, fused) -> None:
    batch = ARCHITECTURES[name].batch()
    plain, fast, exact = models(name, precision)
    exact = one_step(exact, batch)
    with precision():
        theirs = one_step(plain, batch)
        assert not fused
        ours = one_step(fast, batch)
    assert fused == ["block"] * LAYERS[name]
    assert sum(map(is_adapter, ours)) == 4 * LAYERS[name]
    assert_as_accurate(in_dtypes_of(ours, theirs), theirs, exact, precision.computed, LAYERS[name])


@pairs(MODELS, [FP32, BF16, AUTOCAST], always=[])
def test_three_optimizer_steps(name: str, precision: Precision) -> None:
    batches = [ARCHITECTURES[name].batch(seed=seed) for seed in range(3)]
    plain, fast, exact = models(name, precision)
    exact = three_steps(exact, batches)
    with precision():
        theirs, ours = three_steps(plain, batches), three_steps(fast, batches)
    ours = in_dtypes_of(ours, theirs)
    assert_as_accurate(ours, theirs, exact, precision.computed, 3 * LAYERS[name])


def assert_same_in_fp64(
    model: nn.Module, batch: dict[str, Tensor], tolerance: float = 1e-11
) -> nn.Module:
    """Where nothing but the order of sums is left to tell ours from theirs; returns ours."""
    plain = model.double()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    expected, actual = one_step(plain, batch), one_step(fast, batch)
    assert actual.keys() == expected.keys()
    # a factor in front of a layernorm has a gradient that cancels: it is as exact as what cancels
    largest = max(value.norm() for value in expected.values())
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= tolerance * (value.norm() + 1e-4 * largest), key
    return fast


BOTTLENECKS = [
    name
    for name, config in ADAPTER_CONFIG_MAP.items()
    if isinstance(config, BnConfig)
    or any(isinstance(part, BnConfig) for part in getattr(config, "configs", ()))
]


@pytest.mark.parametrize("config", BOTTLENECKS)
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("bert", "qwen2") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_every_config_of_the_library(name: str, config: str, fused) -> None:
    compacter = "compacter" in config
    if name == "qwen2" and config in ("mam", "unipelt"):
        pytest.skip("the library has no prefixes for models by interface")
    # a bottleneck of 32 / 32 is no multiple of phm_dim, and one of 32 / 4 takes dense matrices
    settled = ADAPTER_CONFIG_MAP[config].replace(reduction_factor=2) if compacter else config
    # in evaluation, as prefixes have a dropout of their own
    model = adapted(name, settled).eval()
    assert_same_in_fp64(model, ARCHITECTURES[name].batch())
    adapters_in_it = sum(len(layer.adapters) for layer in bottleneck_layers(model))
    assert adapters_in_it > 0
    assert fused == ["block"] * adapters_in_it


def config_of(**fields: Any) -> BnConfig:
    return BnConfig(**{"mh_adapter": True, "output_adapter": True, **fields})


ACTIVATIONS = (
    *("relu", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "swish", "silu", "tanh", "sigmoid", "leakyrelu", "leaky_relu"),
    *("quick_gelu", "relu2", "relu6", "mish", "linear"),
)
flags = st.booleans()
configs = st.builds(
    config_of,
    reduction_factor=st.sampled_from([0.5, 1, 2.5, 16, 100, {"1": 3, "default": 8}]),
    non_linearity=st.sampled_from(ACTIVATIONS),
    mh_adapter=flags,
    cross_adapter=flags,
    original_ln_before=flags,
    original_ln_after=flags,
    ln_before=flags,
    ln_after=flags,
    is_parallel=flags,
    scaling=st.sampled_from([1.0, -0.5, 4.0, "learned", "channel"]),
    use_gating=flags,
    residual_before_ln=st.sampled_from([True, False, "post_add"]),
    adapter_residual_before_ln=flags,
    leave_out=st.sampled_from([[], [0], [1, 3]]),
    init_weights=st.sampled_from(["bert", "mam_adapter", "houlsby"]),
)


def every_flag(examples: int) -> Any:
    def decorate(test: Any) -> Any:
        given_both = given(name=st.sampled_from(MODELS), config=configs)(test)
        suppressed = [HealthCheck.function_scoped_fixture]
        return settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=suppressed,
        )(given_both)

    return decorate


@every_flag(examples=25)
def test_every_flag(name: str, config: BnConfig, fused) -> None:
    assert_config_is_served(name, config, fused)


@pytest.mark.slow
@every_flag(examples=400)
def test_many_combinations_of_flags(name: str, config: BnConfig, fused) -> None:
    assert_config_is_served(name, config, fused)


def assert_config_is_served(name: str, config: BnConfig, fused: list[str]) -> None:
    if name == "qwen2":
        config = config.replace(original_ln_after=True)  # the library refuses others
    if config.residual_before_ln == "post_add" and name not in ("bert", "roberta"):
        config = config.replace(residual_before_ln=True)  # with no layernorm the library fails
    if config.residual_before_ln == "post_add":
        config = config.replace(original_ln_before=True)
    fused.clear()
    model = adapted(name, config)
    # transformers' gelu_fast has ten digits of √(2/π), and RMS norms are in fp32 whatever comes in, so
    # that a difference in the last digit of their input is one in the eighth of their result
    exact = name in ("bert", "roberta", "gpt2") and config.non_linearity != "gelu_fast"
    assert_same_in_fp64(model, ARCHITECTURES[name].batch(), 1e-11 if exact else 1e-6)
    assert fused == ["block"] * sum(len(layer.adapters) for layer in bottleneck_layers(model))
    assert fused


def test_no_layers_for_left_out_ones(fused) -> None:
    config = HOULSBY.replace(leave_out=[0], reduction_factor={"1": 2, "default": 16})
    model = adapted("bert", config)
    fast = assert_same_in_fp64(model, ARCHITECTURES["bert"].batch())
    assert fused == ["block"] * 2
    report = pelt_fast.accelerate(fast)
    assert list(report.idle.values()) == ["no adapter is on this layer"] * 2
    assert [kind.split(",")[0] for kind in report.kinds] == ["32 -> 16"]


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its StochasticDepth, which the library makes an adapter's DropPath of."""

    class StochasticDepth(nn.Module):
        def __init__(self, p: float, mode: str) -> None:
            super().__init__()
            self.p, self.mode = p, mode

        def forward(self, x: Tensor) -> Tensor:
            if not self.training or self.p == 0.0:
                return x
            shape = [x.shape[0]] + [1] * (x.dim() - 1)
            return x * torch.empty(shape, dtype=x.dtype).bernoulli_(1 - self.p) / (1 - self.p)

    module = types.ModuleType("torchvision.ops.stochastic_depth")
    module.StochasticDepth = StochasticDepth
    for name in ("torchvision", "torchvision.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("adapters.methods.modeling.is_torchvision_available", lambda: True)


RANDOM = {
    "dropout": HOULSBY.replace(dropout=0.5),
    "stochastic_depth": HOULSBY.replace(stochastic_depth=0.5),
}


@pytest.mark.parametrize(
    "config", [adapters.AdapterPlusConfig(), *RANDOM.values()], ids=["plus", *RANDOM]
)
def test_nothing_is_random_in_evaluation(config, torchvision, fused) -> None:
    model = adapted("bert", config).eval()
    assert_same_in_fp64(model, ARCHITECTURES["bert"].batch())
    assert fused


@pytest.mark.parametrize("which", RANDOM)
def test_randomness_obeys_the_seed(which: str, torchvision, fused) -> None:
    batch = ARCHITECTURES["bert"].batch()
    fast = adapted("bert", RANDOM[which]).train()
    pelt_fast.accelerate(fast)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(one_step(fast, batch))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert not torch.equal(results[0]["logits"], results[2]["logits"])
    assert fused == ["block"] * 12


@pytest.mark.parametrize("which", RANDOM)
def test_mean_over_draws_is_the_result_without(which: str, torchvision) -> None:
    # one layer without a norm behind it is linear in the mask, so its outputs average to those without
    config = RANDOM[which].replace(original_ln_after=False)
    layer = bottleneck_layers(adapted("bert", config))[-1].train()
    pelt_fast.accelerate(layer)
    o, x, draws = torch.randn(1, 2, 32), torch.randn(1, 2, 32), 4000
    with torch.no_grad():
        torch.manual_seed(0)
        many = (value.expand(draws, 2, 32) for value in (o, x))
        samples = layer.bottleneck_layer_forward(*many, layer.LayerNorm)
        expected = layer.eval().bottleneck_layer_forward(o, x, layer.LayerNorm)[0]
    deviation = samples.std(0) / math.sqrt(draws)
    assert (deviation > 0).all()
    # 64 numbers, each within five standard deviations of its mean
    assert ((samples.mean(0) - expected).abs() <= 5 * deviation).all()
    if which == "stochastic_depth":
        dropped = (samples - o).abs().amax(dim=(1, 2)) == 0
        assert 0.4 < dropped.double().mean() < 0.6, "whole samples are left out"


def test_the_modules_own_modes_count() -> None:
    layer = bottleneck_layers(adapted("bert", RANDOM["dropout"]))[-1].eval()
    pelt_fast.accelerate(layer)
    args = (*torch.randn(2, 1, 5, 32), layer.LayerNorm)
    still = layer.bottleneck_layer_forward(*args)
    layer.adapters["a"].dropout.train()
    assert not torch.equal(layer.bottleneck_layer_forward(*args), still)
    layer.adapters["a"].dropout.p = 0.0
    assert torch.equal(layer.bottleneck_layer_forward(*args), still)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name: str, fused) -> None:
    batch = ARCHITECTURES[name].batch()
    fast = adapted(name, HOULSBY.replace(dropout=0.3)).double().train()
    pelt_fast.accelerate(fast)
    torch.manual_seed(3)
    direct = one_step(fast, batch)
    calls = len(fused)
    fast.gradient_checkpointing_enable()  # never reentrant: the library refuses
    torch.manual_seed(3)
    recomputed = one_step(fast, batch)
    assert len(fused) - calls > calls, "nothing was recomputed"
    assert direct.keys() == recomputed.keys()
    for key, value in direct.items():
        torch.testing.assert_close(recomputed[key], value, rtol=1e-11, atol=1e-13)
