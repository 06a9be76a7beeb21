"""What is not served is left to the library, with the same result, and the report says what and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters.composition import BatchSplit, Stack
from adapters.methods.bottleneck import BottleneckLayer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pelt_fast
from pelt_fast.integrations import Report

from .adapters_models import HOULSBY, adapted, bottleneck_layers, plain_model, randomize
from .conftest import ARCHITECTURES
from .parity import assert_equal_but_for_rounding

BATCH = {"input_ids": ARCHITECTURES["bert"].batch()["input_ids"]}
FULL = HOULSBY.replace(use_gating=True, ln_before=True, ln_after=True)


def one_layer(config: Any = FULL) -> BottleneckLayer:
    model = adapted("bert", config)
    return bottleneck_layers(model)[-1]


@pytest.fixture
def states() -> tuple[Tensor, Tensor, nn.Module]:
    """hidden_states, residual_input and layer_norm of a call."""
    generator = torch.Generator().manual_seed(2)
    o, x = torch.randn(2, 3, 5, 32, generator=generator)
    return o, x, nn.LayerNorm(32)


@pytest.fixture
def assert_delegated(states, fused) -> Callable[..., None]:
    """assert_delegated(layer, reason): the library computes, and the report gives the reason."""

    def assert_delegated(
        layer: BottleneckLayer, reason: str, args: Any = states, reported: bool = True
    ) -> None:
        expected = layer.bottleneck_layer_forward(*args)
        model = nn.ModuleDict({"it": layer})
        report = pelt_fast.accelerate(model)
        assert torch.equal(layer.bottleneck_layer_forward(*args), expected)
        assert not fused, "it was not the library that computed"
        if reported:
            assert reason in {**report.left, **report.waiting}["it"]
            assert reason in str(report)
        else:
            assert report.replaced == ["it"]
            assert report.kinds
        pelt_fast.restore(model)

    return assert_delegated


def test_the_plain_layer_is_served(states, fused) -> None:
    layer = one_layer()
    expected = layer.bottleneck_layer_forward(*states)
    report = pelt_fast.accelerate(layer)
    assert report == Report(
        "adapters",
        replaced=[""],
        fast={"bottleneck layer": 1},
        kinds=report.kinds,
        base={"dropout": 1, "frozen linear": 1},
        compat="adapters",
    )
    assert list(report.kinds.values()) == [1]
    assert "32 -> 8, sequential, gelu, gated, float32 over float32, T = 2048" in str(report)
    assert_equal_but_for_rounding(layer.bottleneck_layer_forward(*states), expected)
    assert fused == ["block"]


def test_a_compacter_beside_a_plain_adapter(fused) -> None:
    compacter = adapters.CompacterConfig(reduction_factor=4)
    plain = adapted("bert", HOULSBY, compacter).double().eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    for names in (["a", "b"], ["b", "a"]):
        for setup in (Stack(*names), BatchSplit(*names, batch_sizes=[1, 2])):
            fused.clear()
            results = []
            for model in (plain, fast):
                model.adapters_config.active_setup = setup
                results.append(model(**BATCH).logits)
            torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)
            assert fused == ["core"] * 8
            assert not pelt_fast.accelerate(fast).waiting


@pytest.mark.parametrize(
    ("name", "found"),
    [("laplace", "LaplaceActivation"), ("gelu_10", "ClippedGELUActivation"), ("prelu", "PReLU")],
)
def test_activations_that_kernels_do_not_have(name, found, assert_delegated) -> None:
    layer = one_layer(FULL.replace(non_linearity=name))
    assert_delegated(layer, f"adapter 'a': its activation is a {found}")


def test_another_slope_is_another_activation(assert_delegated) -> None:
    layer = one_layer(FULL.replace(non_linearity="leaky_relu"))
    layer.adapters["a"].non_linearity.f.negative_slope = 0.3
    assert_delegated(layer, "its activation is a LeakyReLU")


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, dx, dy: None)


def own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


PARTS = {
    "": "it",
    "adapter_down": "adapter_down",
    "adapter_down.1": "its down projection",
    "adapter_down.2": "its activation",
    "adapter_down.2.f": "its activation",
    "adapter_up": "its up projection",
    "dropout": "its dropout",
    "gate": "its gate",
    "adapter_norm_before": "its adapter_norm_before",
    "adapter_norm_after": "its adapter_norm_after",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", [hook, pre_hook, backward_hook, own_forward])
def test_what_inner_modules_do_besides_is_kept(change, part, assert_delegated) -> None:
    layer = one_layer()
    change(layer.adapters["a"].get_submodule(part))
    assert_delegated(layer, f"adapter 'a': {PARTS[part]}")


@pytest.mark.parametrize("part", ["adapter_down.1", "adapter_up", "gate"])
def test_parametrizations_are_kept(part, assert_delegated) -> None:
    layer = one_layer()
    parametrizations.weight_norm(layer.adapters["a"].get_submodule(part))
    assert_delegated(layer, f"{PARTS[part]} is parametrized")


def test_hooks_on_the_layernorm_of_the_model_run(states, fused) -> None:
    o, x, norm = states
    layer, seen = one_layer(), []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    pelt_fast.accelerate(layer)
    y = layer.bottleneck_layer_forward(o, x, norm)
    assert fused == ["block"]
    assert torch.equal(seen[0], y)


def test_hooks_put_on_later_are_kept(states, fused) -> None:
    layer = one_layer()
    pelt_fast.accelerate(layer)
    before = layer.bottleneck_layer_forward(*states)
    handle = layer.adapters["a"].adapter_up.register_forward_hook(lambda m, args, y: y * 0)
    assert not torch.allclose(layer.bottleneck_layer_forward(*states), before)
    handle.remove()
    assert torch.equal(layer.bottleneck_layer_forward(*states), before)
    assert len(fused) == 2


def test_global_hooks_are_kept(states, fused) -> None:
    layer = one_layer()
    pelt_fast.accelerate(layer)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(module)
    )
    try:
        layer.bottleneck_layer_forward(*states)
    finally:
        handle.remove()
    assert layer.adapters["a"].adapter_up in seen
    assert not fused


def test_subclasses_of_adapters_are_left(assert_delegated) -> None:
    layer = one_layer()
    adapter = layer.adapters["a"]

    class Mine(type(adapter)):
        pass

    adapter.__class__ = Mine
    assert_delegated(layer, "adapter 'a': it is a Mine")


def test_layers_with_methods_of_their_own_are_left(assert_delegated) -> None:
    layer = one_layer()

    class Mine(type(layer)):
        def compose_stack(self, *args, **kwargs):
            return super().compose_stack(*args, **kwargs)

    library_class = type(layer)
    layer.__class__ = Mine
    assert_delegated(layer, "it has a compose_stack of its own")
    layer.__class__ = library_class
    forward = layer.bottleneck_layer_forward
    layer.bottleneck_layer_forward = lambda *args: forward(*args) * 2
    assert_delegated(layer, "it has a bottleneck_layer_forward of its own")


@pytest.mark.parametrize("dropout", [nn.AlphaDropout(0.5), nn.Dropout(0.5, inplace=True)])
def test_other_dropouts(dropout, assert_delegated) -> None:
    layer = one_layer()
    layer.adapters["a"].dropout = dropout.eval()
    assert_delegated(layer, "its dropout")


def test_a_scaling_that_is_no_finite_number(states, fused) -> None:
    layer = one_layer()
    layer.adapters["a"].scaling = float("inf")
    assert pelt_fast.accelerate(layer).waiting == {"": "adapter 'a': its scaling is inf"}
    layer.bottleneck_layer_forward(*states)
    assert not fused


def test_a_gate_over_flat_hidden_states(states, assert_delegated) -> None:
    o, x, norm = states
    assert_delegated(one_layer(), "", (o[0], x[0], norm), reported=False)


@pytest.mark.parametrize("larger", [0, 1])
def test_batches_that_differ_are_repeated(larger, states, fused) -> None:
    # as a Parallel of prefixes leaves them
    o, x, norm = states
    args = [o, x]
    args[larger] = args[larger].repeat(2, 1, 1)
    layer = one_layer(HOULSBY)
    expected = layer.bottleneck_layer_forward(*args, norm)
    assert expected.shape[0] == 6
    pelt_fast.accelerate(layer)
    assert_equal_but_for_rounding(layer.bottleneck_layer_forward(*args, norm), expected)
    assert fused == ["core"], "the library repeats"


def test_a_narrow_adapter_over_a_wide_base_fails_as_in_the_library(states) -> None:
    layer = one_layer()
    layer.adapters["a"].bfloat16()
    errors = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            layer.bottleneck_layer_forward(*states)
        errors.append(str(error.value))
        pelt_fast.accelerate(layer)
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (HOULSBY, "residual"),
        (HOULSBY.replace(is_parallel=True), "residual"),
        (adapters.SeqBnConfig(reduction_factor=4, original_ln_after=False), "residual"),
        (adapters.SeqBnConfig(reduction_factor=4, residual_before_ln="post_add"), "norm"),
    ],
)
def test_errors_are_those_of_the_library(config, missing, states) -> None:
    o, x, norm = states
    args = (o, None, norm) if missing == "residual" else (o, x, None)
    layer = one_layer(config)
    with pytest.raises((TypeError, AttributeError, UnboundLocalError)) as expected:
        layer.bottleneck_layer_forward(*args)
    pelt_fast.accelerate(layer)
    with pytest.raises(type(expected.value)) as actual:
        layer.bottleneck_layer_forward(*args)
    assert str(actual.value) == str(expected.value)


def test_no_residual_where_none_is_needed(states, fused) -> None:
    # as hooked models without a norm between attention and feed-forward have it
    o, _, _ = states
    layer = one_layer(HOULSBY.replace(original_ln_after=False, original_ln_before=True))
    expected = layer.bottleneck_layer_forward(o, None, None)
    pelt_fast.accelerate(layer)
    assert_equal_but_for_rounding(layer.bottleneck_layer_forward(o, None, None), expected)
    assert fused == ["block"]


def test_meta_tensors(states) -> None:
    o, x, norm = (value.to("meta") for value in states)
    layer = one_layer().to("meta")
    report = pelt_fast.accelerate(layer)
    assert report.waiting == {"": "adapter 'a': its down projection is on the meta device"}
    assert layer.bottleneck_layer_forward(o, x, norm).shape == o.shape


class Wrapped(Tensor):
    pass


def test_tensor_subclasses(states, assert_delegated) -> None:
    o, x, norm = states
    layer = one_layer()
    assert_delegated(layer, "", (o.as_subclass(Wrapped), x, norm), reported=False)
    up = layer.adapters["a"].adapter_up
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Wrapped))
    assert_delegated(layer, "its up projection is a Wrapped")


def test_function_transforms(states, fused) -> None:
    o, x, norm = states
    layer = one_layer(HOULSBY)

    def value(o: Tensor) -> Tensor:
        return layer.bottleneck_layer_forward(o, x, norm).square().sum()

    expected = torch.func.grad(value)(o)
    pelt_fast.accelerate(layer)
    assert torch.equal(torch.func.grad(value)(o), expected)
    assert not fused


def test_fp64_under_autocast(states, assert_delegated) -> None:
    o, x, norm = (value.double() for value in states)
    with torch.autocast("cpu", torch.bfloat16):
        assert_delegated(one_layer(HOULSBY).double(), "", (o, x, norm), reported=False)


def test_other_methods_are_named() -> None:
    model = adapted(
        "bert",
        adapters.ConfigUnion(
            adapters.SeqBnInvConfig(reduction_factor=4),
            adapters.LoRAConfig(),
            adapters.PrefixTuningConfig(flat=True),
        ),
    )
    report = pelt_fast.accelerate(model)
    # bottleneck layers, linear layers with LoRA, of prefixes attention layers, and one coupling
    assert len(report.replaced) == 2 + 4 + 2 + 1
    assert len(report.idle) == 2
    assert report.fast == {
        "LoRA linear": 4,
        "prefix layer": 2,
        "bottleneck layer": 2,
        "invertible adapter": 1,
    }
    assert not report.left
    merged = pelt_fast.accelerate(adapted("gpt2", adapters.LoRAConfig()))
    assert set(merged.left.values()) == {"it is a LoRAMergedLinear"}
    assert "left to adapters" in str(merged)


def test_a_model_with_lora_alone() -> None:
    model = adapted("bert", "lora")
    report = pelt_fast.accelerate(model)
    assert set(report.idle.values()) == {"no adapter is on this layer"}
    assert not report.left
    assert report.fast == {"LoRA linear": 4}
    assert sum(report.kinds.values()) == 4


def test_the_report_tells_the_state() -> None:
    model = adapted("bert", HOULSBY, adapters.SeqBnConfig(reduction_factor=8))
    first = pelt_fast.accelerate(model)
    assert (len(first.replaced), first.already, first.left, first.waiting) == (4, [], {}, {})
    assert sum(first.kinds.values()) == 4
    model.set_active_adapters("b")
    second = pelt_fast.accelerate(model)
    assert not second.replaced
    assert {*second.already, *second.idle} == set(first.replaced)
    assert set(second.idle.values()) == {"the active adapters are not on this layer"}
    assert [kind.partition(", float32")[0] for kind in second.kinds] == [
        "32 -> 4, sequential, relu"
    ]
    model.set_active_adapters(Stack("a", "b"))
    third = pelt_fast.accelerate(model)
    assert sum(third.kinds.values()) == 4 + 2
    assert "in Stack" in str(third)
    model.set_active_adapters(None)
    idle = pelt_fast.accelerate(model)
    assert set(idle.idle.values()) == {"the active adapters are not on this layer"}
    assert str(idle).startswith("pelt_fast: fast are no layers of adapters, and of the base model ")
    assert "replaced, and idle as the model stands 4:" in str(idle)


def test_adapter_state_of_a_plain_model() -> None:
    report = pelt_fast.accelerate(plain_model())
    assert len(report.idle) == 4
    assert not report.left


def test_two_libraries_in_one_process(fused, served, make) -> None:
    lora = make("bert").eval()
    bottleneck = adapted("bert").eval()
    batch = ARCHITECTURES["bert"].batch()
    expected = [model(**batch).logits for model in (lora, bottleneck)]
    reports = [pelt_fast.accelerate(model) for model in (lora, bottleneck)]
    assert [report.library for report in reports] == ["PEFT", "adapters"]
    for model, logits in zip((lora, bottleneck), expected, strict=True):
        assert_equal_but_for_rounding(model(**batch).logits, logits)
    assert len(served) == 13
    assert fused == ["block"] * 4
    assert [pelt_fast.restore(model) for model in (lora, bottleneck)] == [13, 4]


def test_two_libraries_in_one_model(fused, served) -> None:
    import peft

    model = adapted("bert")
    # of BERT's linear layers the one that the adapters library does not wrap
    config = peft.LoraConfig(target_modules=["attention.output.dense"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.eval()
    expected = model(**BATCH).logits
    types = [type(module) for module in model.modules()]
    report = pelt_fast.accelerate(model)
    assert report.library == "PEFT and adapters"
    assert len(report.replaced) == 2 + 4
    assert sum(report.kinds.values()) == 6
    assert_equal_but_for_rounding(model(**BATCH).logits, expected)
    assert len(served) == 2
    assert fused == ["block"] * 4
    layer = bottleneck_layers(model)[0]
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(RuntimeError, match="Sharded"):
        pelt_fast.restore(model)
    assert len(pelt_fast.accelerate(model).already) == 6, "something was restored before the error"
    layer.__class__ = type(layer).__mro__[1]
    assert pelt_fast.restore(model) == 6
    assert [type(module) for module in model.modules()] == types


def test_randomized_models_are_no_identities() -> None:
    # the other tests would see nothing in an adapter that does nothing
    model = adapted("bert").eval()
    logits = model(**BATCH).logits
    model.set_active_adapters(None)
    assert not torch.allclose(model(**BATCH).logits, logits, rtol=0.1)
    randomize(model, seed=5)
