"""The adapter's reference against numbers worked out by hand, PyTorch's modules and the `adapters` library itself."""

import pytest
import torch
from torch import nn

from pelt_fast.reference import bottleneck_adapter
from pelt_fast.reference.adapter import ACTIVATIONS, layernorm
from pelt_fast.testing import adapter_oracle as oracle
from pelt_fast.testing.adapter_workloads import (
    HOULSBY,
    PARALLEL,
    PFEIFFER,
    PRE_LN,
    T5,
    T5_PFEIFFER,
    AdapterCase,
)
from pelt_fast.testing.oracle import run

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# q = x Dᵀ = [[3], [-1]];  relu(q) Uᵀ = [[6, -3], [0, 0]]
X = [[1.0, 2.0], [-2.0, 1.0]]
DOWN = [[1.0, 1.0]]
UP = [[2.0], [-1.0]]


def call(dtype=torch.float64, down_bias=None, up_bias=None, **more):
    tensors = {
        name: torch.tensor(value, dtype=dtype) if isinstance(value, list) else value
        for name, value in {"x": X, "down": DOWN, "up": UP, "db": down_bias, "ub": up_bias, **more}.items()
    }  # fmt: skip
    x, down, up, db, ub = (tensors.pop(name) for name in ("x", "down", "up", "db", "ub"))
    return bottleneck_adapter(x, down, db, up, ub, **{"activation": "relu", **tensors})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain(dtype):
    y = call(dtype)
    assert y.dtype == dtype
    assert y.tolist() == [[6.0, -3.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_scaling_and_residual(dtype):
    y = call(dtype, down_bias=[1.5], up_bias=[1.0, 0.0], scaling=2.0, residual_x=True)
    # q = [[4.5], [0.5]]; up: [[10, -4.5], [2, -0.5]]
    assert y.tolist() == [[21.0, -7.0], [2.0, 0.0]]


def test_scale_for_each_feature_and_gate_for_each_token():
    assert call(scale=[0.5, 2.0], gate=[1.0, 7.0]).tolist() == [[3.0, -6.0], [0.0, 0.0]]
    assert call(scale=[0.5], gate=[-2.0, 7.0]).tolist() == [[-6.0, 3.0], [0.0, 0.0]]


def test_dropout_keeps_and_rescales_what_is_added():
    keep = torch.tensor([[True, False], [False, True]])
    y = call(dropout_p=0.5, keep=keep, residual_x=True)
    assert y.tolist() == [[13.0, 2.0], [-2.0, 1.0]]
    y = call(dropout_p=1.0, keep=torch.zeros_like(keep), residual_x=True)
    assert y.tolist() == X


def test_skip_goes_in_and_comes_out():
    skip = [[1.0, 0.0], [0.0, 3.0]]  # x + skip = [[2, 2], [-2, 4]]
    assert call(skip=skip, skip_in=True).tolist() == [[8.0, -4.0], [4.0, -2.0]]
    assert call(skip=skip, residual_skip=True).tolist() == [[7.0, -3.0], [0.0, 3.0]]
    both = call(skip=skip, skip_in=True, residual_x=True, residual_skip=True)
    assert both.tolist() == [[10.0, -2.0], [2.0, 2.0]]


def test_layernorms_come_before_and_after():
    # deviations of both rows are ±1 from the mean with eps 3: divided by 2
    x = torch.tensor([[1.0, 3.0], [5.0, 3.0]], dtype=torch.float64)
    weight, bias = torch.tensor([2.0, 4.0]).double(), torch.tensor([0.0, 1.0]).double()
    normal = [[-1.0, 3.0], [1.0, -1.0]]
    assert layernorm(x, weight, bias, 3.0).tolist() == normal
    before = call(x=x.tolist(), pre_weight=weight, pre_bias=bias, pre_eps=3.0)
    assert before.tolist() == [[4.0, -2.0], [0.0, 0.0]]
    zero = [[0.0], [0.0]]
    after = call(x=x.tolist(), up=zero, residual_x=True, ln_weight=weight, ln_bias=bias, eps=3.0)
    assert after.tolist() == normal


def test_gradients():
    x, down, up, db, ub = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for v in (X, DOWN, UP, [0.0], [0.0, 0.0])
    )
    y = bottleneck_adapter(x, down, db, up, ub, activation="relu", scaling=0.5, residual_x=True)
    dy = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    dx, ddown, dup, ddb, dub = torch.autograd.grad(y, (x, down, up, db, ub), dy)
    # dw = dy / 2; da = dw U = [[1], [-1]]; relu' = [[1], [0]]
    assert dx.tolist() == [[2.0, 1.0], [0.0, 2.0]]
    assert ddown.tolist() == [[1.0, 2.0]]
    assert dup.tolist() == [[1.5], [0.0]]
    assert ddb.tolist() == [1.0]
    assert dub.tolist() == [0.5, 1.0]


def test_layernorm_is_pytorchs():
    norm = nn.LayerNorm(24, eps=1e-3, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layernorm(x, norm.weight, norm.bias, 1e-3), norm(x))


MODULES = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "leaky_relu": nn.LeakyReLU(),
    "relu6": nn.ReLU6(),
    "mish": nn.Mish(),
    "linear": nn.Identity(),
}
POINTS = torch.linspace(-9, 9, 401, dtype=torch.float64)


@pytest.mark.parametrize("name", MODULES)
def test_activations_are_those_of_pytorch(name):
    torch.testing.assert_close(ACTIVATIONS[name](POINTS), MODULES[name](POINTS))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((name, name) for name in ACTIVATIONS),
        *(("gelu_tanh", name) for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate")),
        ("gelu", "gelu_python"),
        ("silu", "swish"),
    ],
)  # fmt: skip
def test_activations_are_those_of_transformers(ours, theirs):
    activations = pytest.importorskip("transformers.activations")
    theirs = {"gelu_tanh": "gelu_new"}.get(theirs, theirs)
    expected = activations.ACT2FN[theirs](POINTS)
    # gelu_fast has ten digits of √(2/π), gelu_accurate holds it in fp32
    torch.testing.assert_close(ACTIVATIONS[ours](POINTS), expected, rtol=1e-7, atol=1e-7)


def library_adapter(case, inputs, **flags):
    """An adapter of the library, with the tensors of ``inputs``."""
    adapters = pytest.importorskip("adapters")
    modeling = pytest.importorskip("adapters.methods.modeling")
    config = adapters.BnConfig(
        mh_adapter=False,
        output_adapter=True,
        reduction_factor=1,
        non_linearity=case.activation,
        original_ln_after=case.post_ln,
        scaling={"": case.scaling, "one": "learned", "channel": "channel"}[case.scale],
        **flags,
    )
    kind = modeling.ParallelAdapter if config["is_parallel"] else modeling.Adapter
    adapter = kind("a", case.features, case.bottleneck, config).double().eval()
    layers = (adapter.adapter_down[0], adapter.adapter_up)
    with torch.no_grad():
        for layer, weight, bias in zip(
            layers, (inputs.down, inputs.up), (inputs.down_bias, inputs.up_bias), strict=True
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        if case.scale:
            adapter.scaling.copy_(inputs.scale)
    return adapter


def through_the_library(adapter, hidden, input_tensor, layer_norm):
    states, _, residual = adapter.pre_forward(hidden, input_tensor, layer_norm)
    output, *_ = adapter(states, residual)
    return adapter.post_forward(output, hidden, input_tensor, layer_norm)


# block, flags of the library's config, whether the model has a layernorm
BLOCKS_OF_THE_LIBRARY = {
    # the library adds hidden_states and then input_tensor
    "pfeiffer": (PFEIFFER, {"original_ln_before": True, "residual_before_ln": True}),
    "houlsby": (HOULSBY, {"original_ln_before": False, "residual_before_ln": True}),
    "parallel": (PARALLEL, {"original_ln_before": False, "residual_before_ln": True, "is_parallel": True}),
    "t5": (
        {**HOULSBY, "post_ln": False, "activation": "relu"},
        {"original_ln_before": False, "residual_before_ln": True},
    ),
    "t5_pfeiffer": (T5_PFEIFFER, {"original_ln_before": True, "residual_before_ln": True}),
}  # fmt: skip


@pytest.mark.parametrize("scale", ["", "one", "channel"])
@pytest.mark.parametrize("block", BLOCKS_OF_THE_LIBRARY)
def test_blocks_are_those_of_the_adapters_library(block, scale):
    """Output and gradients, in fp64; the oracle, and eager, which must be the same operations."""
    kind, flags = BLOCKS_OF_THE_LIBRARY[block]
    kind = {**kind, "scaling": 1.0 if scale else kind.get("scaling", 1.0)}
    case = AdapterCase("", (2, 5), 24, 8, **kind, scale=scale)
    inputs = case.make(torch.float64)
    # one layernorm of the model, before and after, as in the library
    inputs = inputs.map(
        lambda name, t: getattr(inputs, name.replace("pre_", "ln_")) if name[:4] == "pre_" else t
    )
    names = ("x", "skip", "down", "down_bias", "up", "up_bias", "scale", "ln_weight", "ln_bias")
    leaves = inputs.map(lambda _, t: t.detach().requires_grad_())
    adapter = library_adapter(case, inputs, **{"is_parallel": False, **flags})
    norm = None
    if case.post_ln:
        norm = nn.LayerNorm(24, eps=case.eps, dtype=torch.float64)
        norm.weight, norm.bias = nn.Parameter(inputs.ln_weight), nn.Parameter(inputs.ln_bias)
    pair = (leaves.x, leaves.skip)
    hidden, input_tensor = reversed(pair) if flags.get("is_parallel") else pair
    if not case.post_ln:
        adapter.original_ln_after = True  # adds input_tensor, without a layernorm
    y = through_the_library(adapter, hidden, input_tensor, norm)

    down, up = adapter.adapter_down[0], adapter.adapter_up
    sources = {"x": leaves.x, "skip": leaves.skip, "down": down.weight, "down_bias": down.bias}
    sources |= {"up": up.weight, "up_bias": up.bias}
    sources |= {"scale": adapter.scaling} if scale else {}
    sources |= {"ln_weight": norm.weight, "ln_bias": norm.bias} if norm else {}
    theirs = dict(
        zip(sources, torch.autograd.grad(y, list(sources.values()), inputs.dy), strict=True)
    )
    for ours in (oracle.exact(inputs, None), oracle.eager(inputs, None)):
        torch.testing.assert_close(ours["y"], y.detach())
        for name, gradient in theirs.items():
            found = ours[name]
            if name[:3] == "ln_" and case.pre_ln:
                found = found + ours["pre_" + name[3:]]
            torch.testing.assert_close(found, gradient)
    assert set(theirs) == {name for name in names if getattr(inputs, name) is not None}


@pytest.mark.parametrize(
    "case",
    [AdapterCase("pre_ln", (7,), 24, 8, **PRE_LN), AdapterCase("t5", (7,), 24, 8, **T5)],
    ids=str,
)
def test_sequence_of_modules(case):
    """Without the library: x + up(act(down(norm(x))))."""
    inputs = case.make(torch.float64)

    def modules(leaves):
        h = leaves.x
        if leaves.pre_weight is not None:
            h = nn.functional.layer_norm(h, (24,), leaves.pre_weight, leaves.pre_bias, case.pre_eps)
        q = nn.functional.linear(h, leaves.down, leaves.down_bias)
        return leaves.x + nn.functional.linear(
            MODULES[case.activation](q), leaves.up, leaves.up_bias
        )

    exact = oracle.exact(inputs, None)
    for name, value in run(modules, inputs).items():
        torch.testing.assert_close(exact[name], value)
