"""`bottleneck_block`: the `adapters` library's own block, under every flag that it has."""

import itertools

import pytest
import torch
from torch import nn

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


def same(actual, expected, inputs, modules):
    """Two functions of the inputs: values and all gradients."""
    found = value_and_gradients(actual, inputs, modules)
    wanted = value_and_gradients(expected, inputs, modules)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def compare(config, layer_norm, inputs):
    """Whether the library can run this at all; if so, ours is the same. One input: the block's output is its input."""
    adapter = adapter_of(config)
    spec = spec_of(adapter, config)

    def theirs(*h):
        return library_block(adapter, h[0], h[-1], layer_norm)

    def ours(*h):
        return bottleneck_block(spec, h[0], h[-1], layer_norm, False)

    try:
        theirs(*inputs)
    except (TypeError, UnboundLocalError):
        with pytest.raises(ValueError, match="expected"):
            ours(*inputs)
        return False
    same(ours, theirs, inputs, [adapter, layer_norm])
    return True


def compare_core(config, inputs):
    adapter = adapter_of(config)
    spec = spec_of(adapter, config)
    same(
        lambda x, r: bottleneck_core(spec, x, r, False),
        lambda x, r: adapter(x, r)[0],
        inputs,
        [adapter],
    )


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [torch.randn(2, 3, D, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
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


def test_a_layernorm_without_parameters_is_called(inputs):
    for before, after in itertools.product([False, True], repeat=2):
        config = BnConfig(True, True, 2, "relu", original_ln_before=before, original_ln_after=after)
        assert compare(config, norm_of("bare"), inputs)


@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_output_of_the_sublayer_may_be_its_input(norm):
    """o is x: the same tensor twice in every sum."""
    torch.manual_seed(0)
    h = torch.randn(2, 3, D, dtype=torch.float64)
    for parallel, before, residual in itertools.product(
        [False, True], [False, True], [True, False]
    ):
        config = BnConfig(
            *(True, True, 2, "tanh"),
            is_parallel=parallel,
            original_ln_before=before,
            residual_before_ln=residual,
        )
        assert compare(config, norm_of(norm), [h])


@pytest.mark.parametrize("parallel", [False, True])
def test_core_is_the_librarys_forward(parallel, inputs):
    for values in itertools.product([False, True], repeat=4):
        names = ("ln_before", "ln_after", "adapter_residual_before_ln", "use_gating")
        config = BnConfig(
            *(True, True, 2, "swish"),
            is_parallel=parallel,
            scaling="channel",
            **dict(zip(names, values, strict=True)),
        )
        compare_core(config, inputs)


def test_gate_is_the_librarys_score(inputs):
    config = BnConfig(True, True, 2, "relu", use_gating=True, ln_before=True)
    adapter = adapter_of(config)
    *_, score = adapter(*inputs, output_gating=True)
    gate = adapter_gate(spec_of(adapter, config), inputs[0])
    assert gate.shape == (2, 1, 1)
    torch.testing.assert_close(gate, score)
    assert adapter_gate(BottleneckSpec(*[torch.zeros(1)] * 4), inputs[0]) is None


ONE_CALL = {
    "pfeiffer": SeqBnConfig(),
    "houlsby": DoubleSeqBnConfig(),
    "parallel": ParBnConfig(),
    "learned scaling": ParBnConfig(scaling="learned"),
    "hooked pfeiffer": SeqBnConfig(original_ln_after=False),
    "hooked houlsby": DoubleSeqBnConfig(original_ln_after=False),
    "hooked parallel": ParBnConfig(original_ln_after=False),
    "own layernorm before": BnConfig(True, True, 2, "relu", ln_before=True),
}


@pytest.mark.parametrize("norm", ["layernorm", "none"])
@pytest.mark.parametrize("name", ONE_CALL)
def test_the_usual_blocks_are_one_call(name, norm, inputs):
    """One function of ours in the graph, and nothing behind it but what its inputs are."""
    config = ONE_CALL[name]
    adapter, layer_norm = adapter_of(config), norm_of(norm)
    o, x = (t.requires_grad_() for t in inputs)
    y = bottleneck_block(spec_of(adapter, config), o, x, layer_norm, False)
    assert y.grad_fn.name() == "BottleneckAdapterFunctionBackward"
    behind = {node.name() for node, _ in y.grad_fn.next_functions if node is not None}
    assert behind <= {"torch::autograd::AccumulateGrad", "ViewBackward0"}


@pytest.mark.parametrize("change", ["subclass", "hook", "pre-hook", "forward"])
def test_a_layernorm_that_does_more_is_called(change, inputs):
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    layer_norm = Doubled(D) if change == "subclass" else nn.LayerNorm(D)
    layer_norm = randomised(layer_norm.double())
    if change == "hook":
        layer_norm.register_forward_hook(lambda m, args, y: 2 * y)
    if change == "pre-hook":
        layer_norm.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    if change == "forward":
        layer_norm.forward = lambda x: 2 * x
    for config in (SeqBnConfig(), DoubleSeqBnConfig(), ParBnConfig()):
        assert compare(config, layer_norm, inputs)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
@pytest.mark.parametrize("parallel", [False, True])
def test_shapes_and_dtypes_that_pytorch_broadcasts_and_promotes(parallel, norm):
    """T5 keeps one projection in fp32, and a residual stream may be wider than what is added to it."""
    torch.manual_seed(0)
    narrow, wide = torch.randn(2, 3, D), torch.randn(1, 3, D, dtype=torch.float64)
    inputs = (wide, narrow) if parallel else (narrow, wide)
    for after, residual in itertools.product([False, True], [False, True]):
        config = BnConfig(
            *(True, True, 2, "relu"),
            is_parallel=parallel,
            ln_after=after,
            adapter_residual_before_ln=True,
            residual_before_ln=residual,
        )
        adapter, layer_norm = adapter_of(config, torch.float32), norm_of(norm)
        expected = library_block(adapter, *inputs, layer_norm)
        actual = bottleneck_block(spec_of(adapter, config), *inputs, layer_norm, False)
        assert actual.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_sums_before_the_adapter_are_promoted():
    torch.manual_seed(0)
    o, x = torch.randn(2, 3, D), torch.randn(2, 3, D, dtype=torch.float64)
    for norm, residual in itertools.product(["layernorm", "none"], [False, True]):
        config = SeqBnConfig(residual_before_ln=residual)
        adapter, layer_norm = adapter_of(config), norm_of(norm)
        expected = library_block(adapter, o, x, layer_norm)
        actual = bottleneck_block(spec_of(adapter, config), o, x, layer_norm, False)
        torch.testing.assert_close(actual, expected)


def test_core_adds_a_wider_residual():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, D), torch.randn(1, 3, D, dtype=torch.float64)
    adapter = adapter_of(config := DoubleSeqBnConfig(), torch.float32)
    actual = bottleneck_core(spec_of(adapter, config), x, residual, False)
    torch.testing.assert_close(actual, adapter(x, residual)[0], rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_single_call(inputs):
    config = SeqBnConfig()
    adapter, layer_norm = adapter_of(config, torch.float32), norm_of("layernorm").float()
    o, x = inputs[0].bfloat16(), inputs[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = library_block(adapter, o, x, layer_norm)
        y = bottleneck_block(spec_of(adapter, config), o, x, layer_norm, False)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    assert "BottleneckAdapterFunction" in y.grad_fn.name()


def test_dropout_comes_after_scaling_and_spares_residuals():
    torch.manual_seed(0)
    config = DoubleSeqBnConfig(dropout=0.5, original_ln_after=False)
    adapter = adapter_of(config)
    spec = spec_of(adapter, config)
    o = torch.randn(4, 50, D, dtype=torch.float64)
    u = bottleneck_block(spec, o, None, None, False) - o
    dropped = bottleneck_block(spec, o, None, None, True) - o
    kept = dropped.abs() > 1e-9
    torch.testing.assert_close(dropped[kept], 2 * u[kept])
    assert 0.45 < kept.double().mean() < 0.55


def test_stochastic_depth_leaves_samples_out():
    torch.manual_seed(0)
    spec = spec_of(adapter := adapter_of(DoubleSeqBnConfig()), DoubleSeqBnConfig())
    spec = spec._replace(stochastic_depth=0.25, original_ln_after=False)
    o = torch.randn(400, 2, D, dtype=torch.float64)
    u = adapter.adapter_up(adapter.adapter_down(o))
    y = bottleneck_block(spec, o, None, None, True) - o
    left_out = y.abs().amax((1, 2)) < 1e-9
    torch.testing.assert_close(y[~left_out], u[~left_out] / 0.75)
    assert 0.18 < left_out.double().mean() < 0.32
    torch.testing.assert_close(bottleneck_block(spec, o, None, None, False) - o, u)
    parallel = spec._replace(is_parallel=True)
    torch.testing.assert_close(bottleneck_block(parallel, o, o, None, True) - o, u)
    everything = spec._replace(stochastic_depth=1.0)
    torch.testing.assert_close(bottleneck_block(everything, o, None, None, True), o)


def test_stochastic_depth_draws_as_torchvision_does():
    torch.manual_seed(1)
    spec = spec_of(adapter := adapter_of(DoubleSeqBnConfig()), DoubleSeqBnConfig())
    spec = spec._replace(stochastic_depth=0.5, original_ln_after=False)
    o = torch.randn(8, 2, D, dtype=torch.float64)
    torch.manual_seed(2)
    noise = torch.empty(8, 1, 1, dtype=o.dtype).bernoulli_(0.5).div_(0.5)
    expected = o + noise * adapter.adapter_up(adapter.adapter_down(o))
    torch.manual_seed(2)
    torch.testing.assert_close(bottleneck_block(spec, o, None, None, True), expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "original_ln_before or original_ln_after"),
        ({"is_parallel": True, "original_ln_after": False}, "since is_parallel is set"),
    ],
)
def test_missing_input_is_named(flags, message, inputs):
    config = DoubleSeqBnConfig(**flags)
    spec = spec_of(adapter_of(config), config)
    with pytest.raises(ValueError, match=f"^input_tensor is None; .*{message}"):
        bottleneck_block(spec, inputs[0], None, None, False)


def test_interface_models_without_an_input_need_none(inputs):
    """Phi: the hook finds no residual, and the model adds its own."""
    for config in (
        SeqBnConfig(original_ln_after=False),
        DoubleSeqBnConfig(original_ln_after=False),
    ):
        adapter = adapter_of(config)
        expected = library_block(adapter, inputs[0], None, None)
        actual = bottleneck_block(spec_of(adapter, config), inputs[0], None, None, False)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("value", ["post_norm", None, 1])
def test_other_residuals_are_named(value, inputs):
    spec = spec_of(adapter_of(SeqBnConfig()), SeqBnConfig())._replace(residual_before_ln=value)
    with pytest.raises(ValueError, match=r"residual_before_ln is .*; expected True, False"):
        bottleneck_block(spec, *inputs, norm_of("layernorm"), False)


def test_activations_by_name():
    assert resolve_activation("Swish") == "silu"
    assert resolve_activation("gelu_new") == "gelu_tanh"
    x = torch.randn(5)
    from transformers.activations import ACT2FN

    for name in ("gelu_10", "laplace"):
        assert torch.equal(resolve_activation(name)(x), ACT2FN[name](x))
    with pytest.raises(ValueError, match=r"'sine' is not known; expected .*'relu'"):
        resolve_activation("sine")
    with pytest.raises(TypeError, match="activation is a NoneType; expected a name"):
        resolve_activation(None)
