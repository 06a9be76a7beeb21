"""``nn.Compacter`` and ``nn.PHMLinear``: parameters, shared rules, what they compute, what they refuse."""

import copy

import pytest
import torch
from torch import nn

from pelt_fast.nn import Compacter, PHMLinear
from pelt_fast.reference import phm_matrix


def perturbed(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return module.double()


def test_keys_are_the_librarys():
    layer = Compacter(32, 16, ln_before=True, use_gating=True)
    factors = [f"{factor}" for factor in ("W_left", "W_right", "b", "phm_rule")]
    expected = {f"adapter_down.1.{f}" for f in factors} | {f"adapter_up.{f}" for f in factors}
    expected |= {"gate.weight", "gate.bias", "adapter_norm_before.weight"}
    expected |= {"adapter_norm_before.bias", "adapter_down.0.weight", "adapter_down.0.bias"}
    assert set(layer.state_dict()) == expected
    for key in ("W", "phm_rule_left", "phm_rule_right"):
        linear = PHMLinear(8, 4, factorized_phm_W=False, factorized_phm_rule=True, phm_bias=False)
        assert key in linear.state_dict()


def test_one_rule_for_all_layers():
    rule = Compacter.new_rule(4, phm_init_range=0.5)
    layers = nn.ModuleList(Compacter(32, 16, phm_rule=rule, original_ln_after=False) for _ in "ab")
    assert sum(parameter is rule for parameter in layers.parameters()) == 1
    for module in (layers, copy.deepcopy(layers)):
        x = torch.randn(2, 3, 32)
        module[1](module[0](x)).square().sum().backward()
        found = [p for name, p in module.named_parameters() if name.endswith("phm_rule")]
        assert len(found) == 1
        assert found[0].grad.count_nonzero() == 64
    assert layers[0].phm_rule is layers[1].phm_rule
    assert next(iter(layers.double().parameters())).dtype == torch.float64
    assert layers[0].phm_rule is layers[1].phm_rule is rule


@pytest.mark.parametrize("rule", [None, "shared"])
@pytest.mark.parametrize("factorized", [True, False])
def test_it_computes_the_formula(rule, factorized):
    shared = Compacter.new_rule(4) if rule else None
    layer = Compacter(
        *(40, 20), phm_rule=shared, factorized_phm_W=factorized, activation="tanh", dropout=0.5
    ).eval()
    perturbed(layer)
    norm = perturbed(nn.LayerNorm(40))
    o, x = torch.randn(2, 3, 40).double(), torch.randn(2, 3, 40).double()
    down, up = layer.adapter_down[0], layer.adapter_up
    (d, u) = (phm_matrix(*p.weight(layer.phm_rule)) for p in (down, up))
    expected = norm(o + torch.tanh(o @ d + down.b) @ u + up.b + x)
    torch.testing.assert_close(layer(o, x, norm), expected)
    torch.testing.assert_close(down(o, layer.phm_rule), o @ d + down.b)


def test_initialisation():
    torch.manual_seed(0)
    layer = Compacter(512, 256, init_weights_seed=3)
    again = Compacter(512, 256, init_weights_seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True)
    )
    left = layer.adapter_down[0].W_left
    assert abs(left.std().item() / (2 / (128 + 1)) ** 0.5 - 1) < 0.1
    assert not layer.adapter_up.b.any()
    assert 0.002 < layer.adapter_up.phm_rule.std() < 0.05
    layer.reset_parameters(seed=4)
    assert not torch.equal(left, again.adapter_down[0].W_left)
    assert Compacter.new_rule(3, phm_c_init="uniform").abs().max() > 0.5
    assert not Compacter.new_rule(3, learn_phm=False).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((30, 16), ValueError, "in_features is 30; expected a multiple of phm_dim = 4"),
        ((32, 6), ValueError, "out_features is 6; expected a multiple"),
        ((32, 0), ValueError, "bottleneck_size is 0; expected 1 or more"),
    ],
)
def test_sizes_that_do_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        Compacter(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"phm_dim": 0}, ValueError, "phm_dim is 0; expected 1 or more"),
        ({"phm_rank": 1.0}, TypeError, "phm_rank is a float; expected an integer"),
        ({"phm_c_init": "zero"}, ValueError, "phm_c_init is 'zero'; expected 'normal' or"),
        ({"phm_rule": torch.zeros(4, 4, 4)}, TypeError, "phm_rule is a Tensor; expected an nn.P"),
        ({"phm_rule": nn.Parameter(torch.zeros(3, 3, 3))}, ValueError, r"shape \(3, 3, 3\)"),
        ({"init_weights": "bert"}, TypeError, "init_weights is given"),
    ],
)
def test_options_that_are_not_possible(options, error, words):
    with pytest.raises(error, match=words):
        Compacter(32, 16, **options)


def test_a_shared_rule_must_be_given():
    with pytest.raises(ValueError, match="rule is None; expected the rule"):
        PHMLinear(8, 4, shared_phm_rule=True)(torch.zeros(2, 8))


def test_configs():
    pytest.importorskip("adapters")
    layer = Compacter.from_config("compacter", 768, dtype=torch.bfloat16)
    assert (layer.bottleneck_size, layer.phm_rule.dtype) == (24, torch.bfloat16)
    with pytest.raises(ValueError, match="config has no phm_layer; expected Compacter's"):
        Compacter.from_config("seq_bn", 768)
    with pytest.raises(ValueError, match="shared_W_phm"):
        Compacter.from_config(
            {
                "phm_layer": True,
                "shared_W_phm": True,
                "non_linearity": "relu",
                "reduction_factor": 2,
            },
            32,
        )
