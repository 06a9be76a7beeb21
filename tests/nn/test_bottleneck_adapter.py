"""`BottleneckAdapter`: the `adapters` library's module, its parameters, its start, its results."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pelt_fast
from pelt_fast.nn import BottleneckAdapter

modeling = pytest.importorskip("adapters.methods.modeling")
from adapters import BnConfig, ConfigUnion, LoRAConfig, PrefixTuningConfig
from adapters.configuration import ADAPTER_CONFIG_MAP

D = 12


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def config_of(**fields):
    return BnConfig(**{"mh_adapter": True, "output_adapter": True, "reduction_factor": 3} | fields)


def library_adapter(config, size=D):
    kind = modeling.ParallelAdapter if config.is_parallel else modeling.Adapter
    return kind("a", size, int(size // config.reduction_factor), config)


def library_block(adapter, o, x, layer_norm):
    h, _, residual = adapter.pre_forward(o, x, layer_norm)
    return adapter.post_forward(adapter(h, residual)[0], o, x, layer_norm)


flags = st.booleans()
configs = st.builds(
    config_of,
    non_linearity=st.sampled_from(
        ["relu", "gelu", "gelu_new", "swish", "leakyrelu", "laplace", "prelu"]
    ),
    reduction_factor=st.sampled_from([0.5, 1, 2.5, 3, 16, 100]),
    original_ln_before=flags,
    original_ln_after=flags,
    ln_before=flags,
    ln_after=flags,
    is_parallel=flags,
    scaling=st.sampled_from([1.0, -0.5, 4.0, "learned", "channel"]),
    use_gating=flags,
    residual_before_ln=st.sampled_from([True, False, "post_add"]),
    adapter_residual_before_ln=flags,
)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(config=configs, dtype=st.sampled_from([torch.float32, torch.float64]), norm=flags)
def test_results_and_gradients_are_the_librarys(config, dtype, norm):
    if config.residual_before_ln == "post_add" and not config.is_parallel:
        config = config.replace(original_ln_before=True)
        norm = True
    torch.manual_seed(0)
    theirs = randomised(library_adapter(config).to(dtype))
    ours = BottleneckAdapter.from_config(config, D, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    layer_norm = randomised(nn.LayerNorm(D, dtype=dtype)) if norm else None
    o, x = (torch.randn(2, 3, D, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 3, D, dtype=dtype)

    def value_and_gradients(adapter, block):
        named = dict(adapter.named_parameters())
        leaves = [
            o,
            x,
            *(layer_norm.parameters() if norm else []),
            *(named[n] for n in sorted(named)),
        ]
        y = block()
        return y, *torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)

    expected = value_and_gradients(theirs, lambda: library_block(theirs, o, x, layer_norm))
    actual = value_and_gradients(ours, lambda: ours(o, x, layer_norm))
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4}[dtype]
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


def every_form():
    for ln, scaling, gate, parallel in itertools.product(
        [False, True], [2.0, "learned", "channel"], [False, True], [False, True]
    ):
        yield config_of(
            non_linearity="relu",
            ln_before=ln,
            ln_after=ln,
            scaling=scaling,
            use_gating=gate,
            is_parallel=parallel,
        )


def test_state_dict_goes_to_the_library_and_back():
    for config in [*every_form(), config_of(non_linearity="prelu")]:
        theirs = randomised(library_adapter(config))
        ours = BottleneckAdapter.from_config(config, D)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        back = library_adapter(config)
        back.load_state_dict(ours.state_dict())
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, back.state_dict()[name]), name


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("init", ["bert", "mam_adapter", "houlsby"])
def test_a_seed_draws_the_librarys_weights(init, seed):
    for form in every_form():
        config = form.replace(init_weights=init, init_weights_seed=seed)
        torch.manual_seed(3)
        theirs = library_adapter(config).state_dict()
        torch.manual_seed(3)
        ours = BottleneckAdapter.from_config(config, D).state_dict()
        for name, value in theirs.items():
            assert torch.equal(value, ours[name]), name


def test_own_seed_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    BottleneckAdapter(D, 4)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    BottleneckAdapter(D, 4, init_weights_seed=11)
    # the layers' own initialisation draws before the seed is set, as in the library
    assert not torch.equal(torch.get_rng_state(), expected)
    before = torch.get_rng_state()
    layer = BottleneckAdapter(D, 4)
    torch.set_rng_state(before)
    layer.reset_parameters(seed=11)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_touches_no_other_devices_generator(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", None)  # which seeds all of them
    before = torch.get_rng_state()
    layer = BottleneckAdapter(D, 4, init_weights_seed=11, device="meta")
    assert torch.equal(torch.get_rng_state(), before)
    layer = BottleneckAdapter(D, 4, init_weights_seed=11)
    for seed in (2**64, 1.0, True):
        with pytest.raises((TypeError, ValueError), match=r"^seed is a"):
            layer.reset_parameters(seed)
    for seed in (-(2**63), 2**64 - 1):
        layer.reset_parameters(seed)


@pytest.mark.parametrize("init", ["bert", "mam_adapter", "houlsby"])
def test_reset_parameters_draws_again(init):
    layer = BottleneckAdapter(D, 4, init_weights=init, use_gating=True)
    randomised(layer)
    torch.manual_seed(0)
    layer.reset_parameters(seed=5)
    again = BottleneckAdapter(D, 4, init_weights=init, use_gating=True, init_weights_seed=5)
    for name in ("adapter_down.0.weight", "adapter_up.weight", "adapter_up.bias"):
        assert torch.equal(layer.state_dict()[name], again.state_dict()[name]), name
    assert layer.gate.weight.abs().max() < 1


@pytest.mark.parametrize("name", sorted(ADAPTER_CONFIG_MAP))
def test_named_configs(name):
    config = ADAPTER_CONFIG_MAP[name]
    if not isinstance(config, BnConfig) or config.phm_layer:
        with pytest.raises(ValueError, match=r"architecture|phm_layer"):
            BottleneckAdapter.from_config(name, 32)
        return
    layer = BottleneckAdapter.from_config(name, 32)
    theirs = library_adapter(config, 32)
    layer.load_state_dict(theirs.state_dict())
    for field in ("original_ln_before", "original_ln_after", "is_parallel", "residual_before_ln"):
        assert getattr(layer, field) == config[field]


@pytest.mark.parametrize("form", [dict, lambda c: c.to_dict(), lambda c: c])
def test_configs_as_dicts(form):
    config = config_of(non_linearity="tanh", reduction_factor=4, dropout=0.3, scaling="channel")
    layer = BottleneckAdapter.from_config(form(config), D)
    assert layer.bottleneck_size == 3
    assert layer.dropout == 0.3
    assert layer.scaling.shape == (D,)


def test_missing_fields_are_the_librarys_defaults():
    layer = BottleneckAdapter.from_config({"non_linearity": "relu", "reduction_factor": 2}, D)
    for name, value in config_of(non_linearity="relu").items():
        if hasattr(layer, name) and name not in ("reduction_factor", "non_linearity"):
            assert getattr(layer, name) == value, name


@pytest.mark.parametrize(
    ("factor", "layer", "expected"),
    [
        (16, None, 1),
        (100, None, 1),
        (5, None, 2),
        (0.5, None, 24),
        (2.5, None, 4),
        ({"1": 6, "default": 2}, 1, 2),
        ({"1": 6, "default": 2}, 4, 6),
        ({"default": 2}, None, 6),
    ],
)
def test_reduction_factor(factor, layer, expected):
    config = config_of(non_linearity="relu", reduction_factor=factor)
    adapter = BottleneckAdapter.from_config(config, D, layer=layer)
    assert adapter.bottleneck_size == expected
    assert adapter.adapter_down[0].weight.shape == (expected, D)


@pytest.mark.parametrize(
    ("fields", "arguments", "error", "message"),
    [
        ({"reduction_factor": 0}, {}, ValueError, "reduction_factor is 0; expected a positive"),
        ({"reduction_factor": "4"}, {}, TypeError, "reduction_factor is a str; expected a number"),
        ({"reduction_factor": {"1": 4}}, {"layer": 2}, ValueError, "for layers 1; expected"),
        ({"leave_out": [0, 2]}, {"layer": 2}, ValueError, "layer is 2, which is in leave_out"),
        ({"phm_layer": True}, {}, ValueError, "phm_layer"),
        ({"architecture": "lora"}, {}, ValueError, "architecture 'lora'"),
        ({"non_linearity": None}, {}, TypeError, "non_linearity is a NoneType; expected the name"),
        ({"non_linearity": "nope"}, {}, ValueError, "'nope' is not known.*'relu'"),
        ({"scaling": "both"}, {}, ValueError, "scaling is 'both'; expected a number or 'learned'"),
        ({"reduction_factor": 5e-324}, {}, ValueError, "reduction_factor is 5e-324; .* bottleneck"),
        ({"reduction_factor": 1e-9}, {}, ValueError, "reduction_factor is 1e-09; .* bottleneck"),
        ({"reduction_factor": 10**400}, {}, ValueError, "reduction_factor is too large"),
        ({"reduction_factor": {}}, {}, ValueError, "reduction_factor is empty"),
        ({"reduction_factor": {"1": "a", "2": 4}}, {"layer": 2}, TypeError, "is a str; expected"),
        ({"leave_out": 3}, {"layer": 2}, TypeError, "leave_out is a int; expected a list"),
        ({"leave_out": "2"}, {"layer": 2}, TypeError, "leave_out is a str; expected a list"),
        ({"leave_out": ["2"]}, {"layer": 2}, TypeError, "leave_out has a str; expected indices"),
        ({"mh_adapter": "no"}, {}, TypeError, "mh_adapter is a str; expected True or False"),
        ({"phm_layer": 0}, {}, TypeError, "phm_layer is a int; expected True or False"),
        ({"architecture": [[[]]]}, {}, ValueError, "architecture a list; expected"),
    ],
)
def test_bad_configs_are_named(fields, arguments, error, message):
    config = {"non_linearity": "relu", "reduction_factor": 2} | fields
    with pytest.raises(error, match=message):
        BottleneckAdapter.from_config(config, D, **arguments)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (ConfigUnion(PrefixTuningConfig(), config_of(non_linearity="relu")), ValueError, "union"),
        (LoRAConfig(), ValueError, "architecture 'lora'"),
        ("nope", ValueError, "config='nope' is not known; expected one of .*'seq_bn'"),
        (None, TypeError, "config is a NoneType; expected a BnConfig"),
        ({"reduction_factor": 2}, ValueError, "config has no 'non_linearity'"),
    ],
)
def test_what_is_no_bottleneck_config_is_named(config, error, message):
    with pytest.raises(error, match=message):
        BottleneckAdapter.from_config(config, D)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size is 0; expected 1 or more"),
        ({"bottleneck_size": 2.0}, TypeError, "bottleneck_size is a float; expected an integer"),
        ({"bottleneck_size": True}, TypeError, "bottleneck_size is a bool; expected an integer"),
        ({"dropout": 1.5}, ValueError, "dropout is 1.5; expected a probability"),
        ({"dropout": None}, TypeError, "dropout is a NoneType; expected a number"),
        ({"stochastic_depth": -1}, ValueError, "stochastic_depth is -1.0; expected a probability"),
        ({"scaling": float("nan")}, ValueError, "scaling is nan; expected a finite number"),
        ({"scaling": None}, TypeError, "scaling is a NoneType; expected a number, 'learned'"),
        ({"scaling": True}, TypeError, "scaling is a bool; expected a number, 'learned'"),
        ({"scaling": 10**400}, ValueError, "scaling is too large for a float; expected a finite"),
        ({"scaling": -(10**5000)}, ValueError, "scaling is too large for a float"),
        ({"dropout": 10**400}, ValueError, "dropout is too large for a float"),
        ({"dropout": True}, TypeError, "dropout is a bool; expected a number"),
        ({"input_size": 2**31}, ValueError, "input_size is 2147483648; expected less than"),
        (
            {"input_size": 10**400},
            ValueError,
            "input_size is an integer of 1329 bits; expected less",
        ),
        ({"bottleneck_size": -(10**5000)}, ValueError, "is an integer of 16610 bits; expected 1"),
        ({"init_weights_seed": 2**64}, ValueError, "_seed is an integer of 65 bits; expected"),
        ({"init_weights_seed": True}, TypeError, "init_weights_seed is a bool; expected"),
        (
            {"init_weights": "a" * 10**6},
            ValueError,
            "init_weights is 'a{5,20}[.]{3}a{5,20}'; expected",
        ),
        *(
            ({flag: 1}, TypeError, f"{flag} is a int; expected True or False")
            for flag in (
                *("use_gating", "is_parallel", "original_ln_before", "original_ln_after"),
                *("ln_before", "ln_after", "adapter_residual_before_ln", "bias"),
            )
        ),
        ({"activation": 3}, TypeError, "activation is a int; expected a name or a callable"),
        ({"activation": "sine"}, ValueError, "'sine' is not known"),
        ({"init_weights": "zeros"}, ValueError, "init_weights is 'zeros'; expected 'bert' or"),
        ({"init_weights_seed": 1.0}, TypeError, "init_weights_seed is a float"),
        (
            {"residual_before_ln": "after"},
            ValueError,
            "'after'; expected True, False or 'post_add'",
        ),
        ({"residual_before_ln": None}, TypeError, "residual_before_ln is a NoneType"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        BottleneckAdapter(**{"input_size": D, "bottleneck_size": 4} | arguments)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return randomised(BottleneckAdapter(D, 4, original_ln_before=True, dtype=torch.float64))


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    o, x = (torch.randn(2, 3, D, dtype=torch.float64) for _ in range(2))
    return o, x, randomised(nn.LayerNorm(D, dtype=torch.float64))


def test_missing_input_is_named(layer, inputs):
    with pytest.raises(ValueError, match=r"^input_tensor is None; expected a tensor"):
        layer(inputs[0])


def test_a_plain_adapter_takes_hidden_states_alone(inputs):
    layer = randomised(BottleneckAdapter(D, 4, original_ln_after=False, dtype=torch.float64))
    down, up = layer.adapter_down, layer.adapter_up
    torch.testing.assert_close(layer(inputs[0]), inputs[0] + up(down(inputs[0])))


def test_without_biases(inputs):
    layer = BottleneckAdapter(D, 4, bias=False, dtype=torch.float64)
    assert list(layer.state_dict()) == ["adapter_down.0.weight", "adapter_up.weight"]
    o, x, norm = inputs
    expected = norm(o + layer.adapter_up(layer.adapter_down(o)) + x)
    torch.testing.assert_close(layer(o, x, norm), expected)


@pytest.mark.parametrize("activation", [torch.sin, nn.PReLU(), nn.Softplus(beta=2.0)])
def test_callables_as_activation(activation, inputs):
    layer = BottleneckAdapter(D, 4, activation=activation).double()
    o, x, norm = inputs
    expected = norm(o + layer.adapter_up(activation(layer.adapter_down[0](o))) + x)
    torch.testing.assert_close(layer(o, x, norm), expected)


def test_an_activation_with_parameters_trains(inputs):
    layer = randomised(BottleneckAdapter(D, 4, activation="prelu", dtype=torch.float32)).double()
    layer(*inputs).square().sum().backward()
    assert layer.state_dict()["non_linearity.f.weight"].shape == (1,)
    assert layer.non_linearity.f.weight.grad.abs() > 0


def test_dropout_acts_in_training_alone(inputs):
    layer = randomised(BottleneckAdapter(D, 4, dropout=0.5, dtype=torch.float64))
    assert not torch.equal(layer(*inputs), layer(*inputs))
    layer.eval()
    o, x, norm = inputs
    torch.testing.assert_close(
        layer(*inputs), norm(o + layer.adapter_up(layer.adapter_down(o)) + x)
    )


def test_dropout_of_everything_leaves_the_residuals(inputs):
    layer = randomised(BottleneckAdapter(D, 4, dropout=1.0, dtype=torch.float64))
    o, x, norm = inputs
    torch.testing.assert_close(layer(*inputs), norm(o + x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied, layer, inputs):
    expected = layer(*inputs)
    twin = copied(layer)
    assert torch.equal(twin(*inputs), expected)
    randomised(layer)
    assert torch.equal(twin(*inputs), expected)


def test_state_dict_through_a_file(layer, inputs):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = BottleneckAdapter(D, 4, original_ln_before=True, dtype=torch.float64)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(*inputs), layer(*inputs))


def test_fp32_parameters_over_bf16_hidden_states(inputs):
    layer = randomised(BottleneckAdapter(D, 4))
    o, x, norm = inputs
    y = layer(o.bfloat16(), x.bfloat16(), norm.bfloat16())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_to_moves_everything():
    layer = BottleneckAdapter(D, 4, scaling="channel", use_gating=True, ln_before=True)
    assert {p.dtype for p in layer.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.device.type for p in layer.to("meta").parameters()} == {"meta"}
    on_meta = BottleneckAdapter(D, 4, device="meta", init_weights="houlsby")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    layer = BottleneckAdapter(D, 6, activation="gelu", original_ln_after=False)
    target = randomised(nn.Linear(D, D))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    x = torch.randn(8, 8, D)
    losses = []
    for _ in range(80):
        loss = (layer(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_use_backend_reaches_the_layer(layer, inputs):
    with pelt_fast.use_backend("reference"):
        expected = layer(*inputs)
    with pelt_fast.use_backend("torch"):
        torch.testing.assert_close(layer(*inputs), expected)
    with pelt_fast.use_backend("cuda"), pytest.raises(pelt_fast.BackendUnavailable):
        layer(*inputs)


def test_repr_names_sizes_and_flags(layer):
    text = repr(layer)
    for part in (
        "input_size=12",
        "bottleneck_size=4",
        "scaling=1.0",
        "original_ln_before=True",
        "relu",
    ):
        assert part in text
