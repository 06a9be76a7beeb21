"""`LoRALinear`: what it computes, what it saves, how it starts."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import pelt_fast
from pelt_fast.nn import LoRALinear


def randomise(layer):
    """LoRA starts at B = 0, where every adapter looks right."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def by_hand(layer, x):
    """In eval mode."""
    y = layer.base_layer(x)
    for name in layer.active_adapters:
        y = y + layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
    return y


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return randomise(LoRALinear(12, 20, r=3, lora_alpha=6.0, dtype=torch.float64))


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, dtype=torch.float64)


def test_forward(layer, x):
    torch.testing.assert_close(layer(x), by_hand(layer, x))


def test_starts_as_the_frozen_linear():
    torch.manual_seed(0)
    layer = LoRALinear(12, 20, r=3, lora_bias=True)
    x = torch.randn(4, 12)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_starts_with_pefts_distributions():
    peft_lora = pytest.importorskip("peft.tuners.lora")
    from peft import LoraConfig

    torch.manual_seed(1)
    ours = LoRALinear(64, 48, r=8)
    theirs = peft_lora.Linear(
        nn.Linear(64, 48), "default", config=LoraConfig(r=8, lora_alpha=8), r=8, lora_alpha=8
    )
    torch.manual_seed(2)
    ours.reset_adapter("default")
    torch.manual_seed(2)
    theirs.reset_lora_parameters("default", init_lora_weights=True)
    assert torch.equal(ours.lora_A["default"].weight, theirs.lora_A["default"].weight)
    assert torch.equal(ours.lora_B["default"].weight, theirs.lora_B["default"].weight)
    assert not ours.lora_B["default"].weight.any()


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_state_dict_goes_to_peft_and_back(bias, lora_bias):
    peft_lora = pytest.importorskip("peft.tuners.lora")
    from peft import LoraConfig

    torch.manual_seed(0)
    ours = randomise(LoRALinear(12, 20, r=3, lora_alpha=6, bias=bias, lora_bias=lora_bias))
    theirs = peft_lora.Linear(
        nn.Linear(12, 20, bias=bias),
        "default",
        config=LoraConfig(r=3, lora_alpha=6, lora_bias=lora_bias),
        r=3,
        lora_alpha=6,
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 12)
    torch.testing.assert_close(theirs(x), ours(x))
    fresh = LoRALinear(12, 20, r=3, lora_alpha=6, bias=bias, lora_bias=lora_bias)
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh(x), ours(x))


def test_state_dict_through_a_file(layer, x):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = LoRALinear(12, 20, r=3, lora_alpha=6.0, dtype=torch.float64)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied, layer, x):
    expected = layer(x)
    twin = copied(layer)
    assert torch.equal(twin(x), expected)
    randomise(layer)
    assert torch.equal(twin(x), expected)
    assert not torch.equal(layer(x), expected)


def test_only_the_adapter_trains(layer):
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}


def test_gradients_are_those_of_the_layers_that_it_is_made_of(layer, x):
    parameters = [p for p in layer.parameters() if p.requires_grad]
    ours = torch.autograd.grad(layer(x).square().sum(), parameters)
    expected = torch.autograd.grad(by_hand(layer, x).square().sum(), parameters)
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    layer, target = LoRALinear(12, 20, r=3), randomise(nn.Linear(12, 20))
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    x = torch.randn(64, 12)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_several_adapters_are_summed(layer, x):
    layer.add_adapter("second", 5, lora_alpha=10.0, lora_bias=True)
    randomise(layer)
    assert layer.active_adapters == ["default", "second"]
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    layer.set_adapter("second")
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    layer.set_adapter([])
    assert torch.equal(layer(x), layer.base_layer(x))


def test_scaling_is_read_at_every_call(layer, x):
    layer.scaling["default"] = -3.0
    torch.testing.assert_close(layer(x), by_hand(layer, x))


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 6 / 3), (True, 6 / math.sqrt(3))])
def test_scaling(use_rslora, expected):
    layer = LoRALinear(12, 20, r=3, lora_alpha=6.0, use_rslora=use_rslora)
    assert layer.scaling["default"] == pytest.approx(expected)


def test_dropout_acts_in_training_alone(x):
    torch.manual_seed(0)
    layer = randomise(LoRALinear(12, 20, r=3, lora_dropout=0.5, dtype=torch.float64))
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), by_hand(layer, x))


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_shares_and_freezes(bias):
    linear = nn.Linear(12, 20, bias=bias)
    layer = LoRALinear.from_linear(linear, r=4, lora_alpha=2.0, adapter_name="mine")
    assert layer.base_layer is linear
    assert not any(p.requires_grad for p in linear.parameters())
    assert layer.scaling == {"mine": 0.5}
    assert (layer.in_features, layer.out_features) == (12, 20)
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), linear(x))


def test_fp32_adapters_over_a_bf16_base():
    torch.manual_seed(0)
    layer = LoRALinear(12, 20, r=3, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    randomise(layer)
    y = layer(torch.randn(4, 12, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def test_to_moves_everything(layer, x):
    layer.to(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(x.float()).dtype == torch.float32
    assert {p.device.type for p in layer.to("meta").parameters()} == {"meta"}


def test_repr_names_sizes_and_ranks(layer):
    layer.add_adapter("second", 5)
    text = repr(layer)
    for part in ("in_features=12", "out_features=20", "default: r=3", "second: r=5"):
        assert part in text


def test_use_backend_reaches_the_layer(layer, x):
    with pelt_fast.use_backend("reference"):
        expected = layer(x)
    with pelt_fast.use_backend("torch"):
        torch.testing.assert_close(layer(x), expected)
    with pelt_fast.use_backend("cuda"), pytest.raises(pelt_fast.BackendUnavailable):
        layer(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, r"r is 0; expected a rank of 1 to 256"),
        ({"r": 257}, r"r is 257; expected a rank of 1 to 256"),
        ({"lora_dropout": -0.5}, r"lora_dropout is -0.5; expected .* between 0 and 1"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is nan; expected a finite number"),
        ({"lora_dropout": 1.5}, r"lora_dropout is 1.5; expected .* between 0 and 1"),
    ],
)
def test_bad_adapters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(12, 20, **arguments)


@pytest.mark.parametrize("value", [True, None, "8"])
@pytest.mark.parametrize("name", ["r", "lora_alpha", "lora_dropout"])
def test_numbers_of_a_wrong_type_are_named(name, value):
    with pytest.raises(TypeError, match=rf"^{name} is a {type(value).__name__}; expected a"):
        LoRALinear(12, 20, **{name: value})


def test_from_linear_takes_linears_alone():
    for other in (nn.Conv1d(12, 20, 1), LoRALinear(12, 20), None):
        with pytest.raises(TypeError, match=rf"^linear is a {type(other).__name__}; expected a"):
            LoRALinear.from_linear(other)
        if other is not None:
            assert any(p.requires_grad for p in other.parameters())


def test_bad_adapter_leaves_the_layer_as_it_was(layer, x):
    expected = layer(x)
    for bad in ({"name": "new", "r": 0}, {"name": "default", "r": 2}):
        with pytest.raises(ValueError, match=r"default|rank"):
            layer.add_adapter(**bad)
    with pytest.raises(RuntimeError):
        layer.add_adapter("new", 2, dtype=torch.int32)
    assert set(layer.lora_A) == set(layer.lora_B) == {"default"}
    with pytest.raises(ValueError, match=r"'absent'.*default"):
        layer.set_adapter("absent")
    assert torch.equal(layer(x), expected)
