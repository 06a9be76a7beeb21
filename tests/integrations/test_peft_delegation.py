"""What is not served is left to PEFT, with the same result, and the report says which layer and why."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pelt_fast
from pelt_fast.integrations import Report


def inject(module: nn.Module, **options) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(module)
    options = {"r": 4, "target_modules": ["0"], "init_lora_weights": False, **options}
    return peft.inject_adapter_in_model(peft.LoraConfig(**options), model)


@pytest.fixture
def layer() -> lora.Linear:
    torch.manual_seed(0)
    return inject(nn.Linear(12, 8))[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def assert_delegated(served) -> Callable[..., None]:
    """assert_delegated(layer, x, reason): PEFT computes, and the report gives the reason."""

    def assert_delegated(layer: nn.Module, x: Tensor, reason: str, reported: bool = True) -> None:
        expected = layer(x)
        model = nn.ModuleDict({"it": layer})
        report = pelt_fast.accelerate(model)
        with pelt_fast.use_backend("torch"):  # which leaves the frozen product to PyTorch
            assert torch.equal(layer(x), expected)
        assert not served, "it was not PEFT that computed"
        if reported:
            assert reason in {**report.left, **report.waiting}["it"]
            assert reason in str(report)
        else:
            assert report.replaced == ["it"]
        pelt_fast.restore(model)

    return assert_delegated


def test_the_plain_layer_is_served(layer, x, served, assert_same) -> None:
    expected = layer(x)
    report = pelt_fast.accelerate(layer)
    assert report == Report(
        library="PEFT", replaced=[""], fast={"LoRA linear": 1}, kinds=report.kinds
    )
    assert list(report.kinds.values()) == [1]
    assert "12 -> 8, r = 4, float32 over float32" in str(report)
    assert_same(layer(x), expected)
    assert len(served) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(nblocks=2, target_modules_bd_a=["0"])},
        {"velora_config": peft.tuners.lora.config.VeloraConfig()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_variants_are_left(options, x, assert_delegated) -> None:
    layer = inject(nn.Linear(12, 8), **options)[0]
    assert_delegated(layer.eval(), x, "adapter 'default': variant ")


def test_a_variant_waits_beside_a_plain_adapter(
    make, randomize, architectures, assert_same, served
) -> None:
    model = make("bert", target_modules=["query"])
    model.add_adapter("dora", peft.LoraConfig(use_dora=True, target_modules=["query"]))
    randomize(model)
    plain = copy.deepcopy(model)
    pelt_fast.accelerate(model)
    batch = architectures["bert"].batch()
    for adapters, calls in (
        (["default"], 2),
        (["dora"], 2),
        (["default", "dora"], 2),
        (["default"], 4),
    ):
        plain.base_model.set_adapter(adapters)
        model.base_model.set_adapter(adapters)
        assert_same(model(**batch).logits, plain(**batch).logits)
        assert len(served) == calls
        report = pelt_fast.accelerate(model)
        assert len(report.waiting) == (2 if "dora" in adapters else 0)
    assert not report.left


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, dx, dy: None)


def own_forward(module: nn.Module) -> None:
    module.forward = lambda x: x.new_ones(*x.shape[:-1], module.out_features)


def weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module)


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("change", [hook, pre_hook, backward_hook, own_forward, weight_norm])
def test_what_inner_layers_do_besides_is_kept(change, part, layer, x, assert_delegated) -> None:
    inner = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    change(inner)
    assert_delegated(layer, x, part)


def test_hooks_put_on_later_are_kept(layer, x, served) -> None:
    pelt_fast.accelerate(layer)
    before = layer(x)
    handle = layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(layer(x), layer.base_layer(x))
    handle.remove()
    assert torch.equal(layer(x), before)
    assert len(served) == 2


def test_global_hooks_are_kept(layer, x, served) -> None:
    pelt_fast.accelerate(layer)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(module)
    )
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.base_layer in seen
    assert not served
    layer(x)
    assert len(served) == 1


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Custom(nn.Linear):
    pass


def test_base_layers_that_are_no_linear_are_left(x, assert_delegated) -> None:
    assert_delegated(inject(Scaled(12, 8))[0], x, "its base layer is a Scaled")


def test_a_subclass_that_keeps_the_forward_is_served(x, served) -> None:
    layer = inject(Custom(12, 8))[0]
    pelt_fast.accelerate(layer)
    layer(x)
    assert len(served) == 1


def test_a_subclass_of_the_lora_layer_is_left(layer, x, assert_delegated) -> None:
    class Mine(lora.Linear):
        pass

    layer.__class__ = Mine
    assert_delegated(layer, x, "Mine, not a peft.tuners.lora.layer.Linear")


def test_a_forward_on_the_instance_is_left(layer, x, assert_delegated) -> None:
    layer.forward = lambda x: x * 2
    assert_delegated(layer, x, "its forward was replaced on the instance")


@pytest.mark.parametrize(
    ("dropout", "reason"),
    [
        (nn.Dropout(0.5, inplace=True).eval(), "works in place"),
        (nn.AlphaDropout(0.5).eval(), "a forward of its own (AlphaDropout)"),
        (nn.Sequential(), "a forward of its own (Sequential)"),
    ],
    ids=["inplace", "alpha", "sequential"],
)
def test_unknown_dropouts(dropout, reason, layer, x, assert_delegated) -> None:
    layer.lora_dropout["default"] = dropout
    assert_delegated(layer, x, reason)


def test_scaling_that_is_no_finite_number(layer, x, assert_delegated) -> None:
    layer.scaling["default"] = torch.tensor(2.0)
    assert_delegated(layer, x, "scaling is tensor(2.), not a finite number")
    layer.scaling["default"] = float("inf")
    assert_delegated(layer, x, "scaling is inf")


def test_a_rank_above_the_limit(x, assert_delegated) -> None:
    assert_delegated(inject(nn.Linear(12, 8), r=257)[0], x, "rank 257 is above 256")


def test_casting_that_is_disabled(layer, x, assert_delegated) -> None:
    layer.cast_input_dtype_enabled = False
    assert_delegated(layer, x, "the cast of its input is disabled")


def test_a_narrow_adapter_over_a_wide_base(layer, x, assert_delegated) -> None:
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    assert_delegated(layer, x, "outside autocast: it is bfloat16, base weight float32")


def test_a_narrow_adapter_over_a_wide_base_under_autocast(layer, x, served) -> None:
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    pelt_fast.accelerate(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert len(served) == 1


def test_fp64_under_autocast(layer, x, assert_delegated) -> None:
    layer.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert_delegated(layer, x.double(), "", reported=False)


def test_errors_are_those_of_peft(layer, x) -> None:
    wrong = x.double()
    with pytest.raises(RuntimeError) as expected:
        layer(wrong)
    pelt_fast.accelerate(layer)
    with pytest.raises(RuntimeError) as actual:
        layer(wrong)
    assert str(actual.value) == str(expected.value)
    with pytest.raises(TypeError, match="must be Tensor, not str"):
        layer("text")


def test_meta_tensors(layer, x) -> None:
    report = pelt_fast.accelerate(layer.to("meta"))
    assert report.waiting == {"": "base weight is on the meta device"}
    assert layer(x.to("meta")).shape == (5, 8)


class Wrapped(Tensor):
    pass


def test_tensor_subclasses(layer, x, assert_delegated) -> None:
    assert_delegated(layer, x.as_subclass(Wrapped), "", reported=False)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().as_subclass(Wrapped))
    assert_delegated(layer, x, "base weight is a Wrapped")


def test_function_transforms(layer, x, served) -> None:
    expected = torch.func.grad(lambda x: layer(x).square().sum())(x)
    rows = torch.func.vmap(layer)(x)
    pelt_fast.accelerate(layer)
    assert torch.equal(torch.func.grad(lambda x: layer(x).square().sum())(x), expected)
    assert torch.equal(torch.func.vmap(layer)(x), rows)
    assert not served


def test_functional_call_is_served(layer, x, served, assert_same) -> None:
    parameters = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    expected = torch.func.functional_call(layer, parameters, (x,))
    pelt_fast.accelerate(layer)
    assert_same(torch.func.functional_call(layer, parameters, (x,)), expected)
    assert len(served) == 1


def test_other_tuners_and_saved_modules_are_left(make) -> None:
    model = make(
        "bert", target_modules=["query", "word_embeddings"], modules_to_save=["classifier"]
    )
    report = pelt_fast.accelerate(model)
    assert len(report.replaced) == 2
    left = {name.rpartition(".")[2]: reason for name, reason in report.left.items()}
    assert left["word_embeddings"] == (
        "it is a peft.tuners.lora.layer.Embedding, not a peft.tuners.lora.layer.Linear"
    )
    assert left["classifier"] == "it is a ModulesToSaveWrapper, which has no LoRA"
    assert len(left) == 2
    assert str(report).startswith(
        "pelt_fast: fast are 2 LoRA linears of PEFT, and of the base model "
    )
    assert "left to PEFT 2:" in str(report)


def test_other_methods_are_left() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoHaConfig(target_modules=["0"], r=2)
    )
    report = pelt_fast.accelerate(model)
    assert not report.replaced
    assert "peft.tuners.loha.layer.Linear" in next(iter(report.left.values()))


def test_attention_modules_are_left(served) -> None:
    attention = inject(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(2, 3, 8)
    expected = attention[0](x, x, x)[0]
    report = pelt_fast.accelerate(attention)
    assert not report.replaced
    assert set(report.left) == {"0", "0.base_layer.out_proj"}
    assert torch.equal(attention[0](x, x, x)[0], expected)


def test_targeted_parameters_are_left() -> None:
    torch.manual_seed(0)
    model = inject(nn.Linear(12, 8), target_modules=[], target_parameters=["0.weight"])
    report = pelt_fast.accelerate(model)
    assert "ParamWrapper" in report.left["0"]


def test_the_report_tells_the_state(make) -> None:
    model = make("bert")
    first = pelt_fast.accelerate(model)
    assert (len(first.replaced), first.already, first.left, first.waiting) == (13, [], {}, {})
    assert sum(first.kinds.values()) == 13
    model.merge_adapter()
    merged = pelt_fast.accelerate(model)
    assert merged.replaced == []
    assert merged.already == first.replaced
    assert set(merged.waiting.values()) == {"adapter 'default' is merged into the base weight"}
    assert not merged.kinds
    text = str(merged)
    assert text.startswith(
        "pelt_fast: fast are no layers of PEFT, and of the base model 8 dropouts"
    )
    assert "; 13 layers had been replaced already" in text
    assert "replaced, but as the layers stand PEFT computes 13:" in text
    assert "and 10 more" in text
    with model.disable_adapter():
        assert set(pelt_fast.accelerate(model).waiting.values()) == {"its adapters are disabled"}


def test_nothing_to_accelerate() -> None:
    with pytest.raises(ValueError, match=r"model \(Linear\) has no PEFT layer"):
        pelt_fast.accelerate(nn.Linear(2, 2))
    assert pelt_fast.restore(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("function", [pelt_fast.accelerate, pelt_fast.restore])
def test_no_module(function) -> None:
    with pytest.raises(TypeError, match=r"model is a dict; expected a torch\.nn\.Module"):
        function({})
