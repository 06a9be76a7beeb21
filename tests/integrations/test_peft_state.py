"""What PEFT's own methods do to a model they do to an accelerated one, whenever they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

import pelt_fast

LAYERS = 13  # LoRA layers of the BERT below


def second_config(**options) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 8, "lora_alpha": 4, "target_modules": ["query", "dense"], **options}
    )


@pytest.fixture
def pair(make, randomize) -> tuple[nn.Module, nn.Module]:
    """A PEFT model with the adapters "default" and "second" (on 9 layers), and it accelerated."""
    plain = make("bert")
    plain.add_adapter("second", second_config())
    randomize(plain)
    plain.eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    return plain, fast


@pytest.fixture
def batch(architectures) -> dict[str, Tensor]:
    return architectures["bert"].batch()


@pytest.fixture
def compare(batch, assert_same) -> Callable[..., Tensor]:
    """compare(plain, fast): both compute the same now; returns it."""

    def compare(plain: nn.Module, fast: nn.Module, **options) -> Tensor:
        with torch.no_grad():
            expected = plain(**batch, **options).logits
            actual = fast(**batch, **options).logits
        assert_same(actual, expected)
        return actual

    return compare


def change(pair: tuple[nn.Module, nn.Module], function: Callable[[nn.Module], object]) -> None:
    for model in pair:
        function(model)


def lora_layers(model: nn.Module) -> list[lora.LoraLayer]:
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


def test_peft_still_sees_its_layers(pair) -> None:
    plain, fast = pair
    assert len(lora_layers(plain)) == len(lora_layers(fast)) == LAYERS
    assert all(isinstance(layer, lora.Linear) for layer in lora_layers(fast))
    status, expected = peft.get_layer_status(fast), peft.get_layer_status(plain)
    assert [s.name for s in status] == [s.name for s in expected]


def test_scaling_is_read_at_call_time(pair, served, compare, assert_same) -> None:
    before = compare(*pair)
    change(pair, lambda m: [layer.set_scale("default", 3.0) for layer in lora_layers(m)])
    scaled = compare(*pair)
    change(pair, lambda m: [layer.scale_layer(0.5) for layer in lora_layers(m)])
    halved = compare(*pair)
    change(pair, lambda m: [layer.unscale_layer() for layer in lora_layers(m)])
    after = compare(*pair)
    assert not torch.allclose(before, scaled)
    assert not torch.allclose(scaled, halved)
    assert_same(after, before)
    assert len(served) == 4 * LAYERS


def test_rescale_context(pair, compare) -> None:
    from peft.helpers import rescale_adapter_scale

    plain, fast = pair
    with rescale_adapter_scale(plain, 0.3), rescale_adapter_scale(fast, 0.3):
        compare(plain, fast)
    compare(plain, fast)


def test_switching_adapters(pair, served, compare) -> None:
    default = compare(*pair)
    assert len(served) == LAYERS
    change(pair, lambda m: m.set_adapter("second"))
    second = compare(*pair)
    assert len(served) == LAYERS + 9, "the layers that lack the adapter are PEFT's"
    change(pair, lambda m: m.set_adapter("default"))
    assert torch.equal(compare(*pair), default)
    assert not torch.allclose(default, second)


def test_switching_adapters_moves_what_trains(pair, batch) -> None:
    change(pair, lambda m: m.set_adapter("second"))
    for model in pair:
        model(**batch).loss.backward()
    grads = [{n for n, p in model.named_parameters() if p.grad is not None} for model in pair]
    assert grads[0] == grads[1]
    assert all(".second." in name for name in grads[0])
    assert len(grads[0]) == 2 * 9


def test_an_adapter_added_later_is_served(pair, randomize, served, compare) -> None:
    change(pair, lambda m: m.add_adapter("third", second_config(r=2, use_rslora=True)))
    change(pair, randomize)
    change(pair, lambda m: m.set_adapter("third"))
    compare(*pair)
    assert len(served) == 9


def test_a_target_added_later_waits_for_the_next_call(make, randomize, served, compare) -> None:
    plain = make("bert", target_modules=["query"])
    fast = copy.deepcopy(plain)
    assert len(pelt_fast.accelerate(fast).replaced) == 2
    pair = (plain, fast)
    change(pair, lambda m: m.add_adapter("wide", second_config(target_modules=["query", "value"])))
    change(pair, randomize)
    change(pair, lambda m: m.base_model.set_adapter(["default", "wide"]))
    compare(*pair)
    assert len(served) == 2
    report = pelt_fast.accelerate(fast)
    assert len(report.replaced) == 2
    assert len(report.already) == 2
    compare(*pair)
    assert len(served) == 2 + 4


def test_deleting_adapters(pair, compare) -> None:
    change(pair, lambda m: m.set_adapter("second"))
    change(pair, lambda m: m.delete_adapter("default"))
    compare(*pair)
    assert not any(".default." in name for name in pair[1].state_dict())


def test_merging_and_unmerging(pair, served, compare, assert_same) -> None:
    before = compare(*pair)
    calls = len(served)
    change(pair, lambda m: m.merge_adapter())
    merged = compare(*pair)
    assert len(served) == calls, "a merged layer is the base layer"
    assert_same(merged, before)
    change(pair, lambda m: m.unmerge_adapter())
    assert_same(compare(*pair), before)
    assert len(served) == calls + LAYERS


def test_the_weight_after_merging_is_not_stale(pair, compare) -> None:
    # merge and unmerge write into the base weight, of which a backend may keep a packed copy
    compare(*pair)
    change(pair, lambda m: m.merge_adapter())
    compare(*pair)
    change(pair, lambda m: m.unmerge_adapter())
    with torch.no_grad():
        change(pair, lambda m: [layer.get_base_layer().weight.mul_(2) for layer in lora_layers(m)])
    compare(*pair)
    for model in pair:
        for layer in lora_layers(model):
            base = layer.get_base_layer()
            base.load_state_dict({k: v * -0.5 for k, v in base.state_dict().items()})
    compare(*pair)


def test_merge_and_unload(pair, compare) -> None:
    plain, fast = (model.merge_and_unload() for model in pair)
    compare(plain, fast)
    assert not lora_layers(fast)
    assert [type(m) for m in plain.modules()] == [type(m) for m in fast.modules()]


def test_unload(pair, compare) -> None:
    plain, fast = (model.unload() for model in pair)
    assert [type(m) for m in plain.modules()] == [type(m) for m in fast.modules()]
    compare(plain, fast)


def test_disabling_adapters(pair, served, compare) -> None:
    plain, fast = pair
    adapted = compare(plain, fast)
    calls = len(served)
    with plain.disable_adapter(), fast.disable_adapter():
        base = compare(plain, fast)
    assert len(served) == calls
    assert not torch.allclose(adapted, base)
    assert torch.equal(compare(plain, fast), adapted)


def test_a_batch_of_mixed_adapters(pair, served, compare, assert_same) -> None:
    # more in test_peft_mixed_batch.py
    names = ["second", "__base__", "default"]
    mixed = compare(*pair, adapter_names=names)
    assert not served, "that is for batches of one adapter"
    whole = compare(*pair)
    assert_same(mixed[2], whole[2])
    assert not torch.allclose(mixed[:2], whole[:2])


def test_weighted_adapters(pair, randomize, compare) -> None:
    for model in pair:
        model.delete_adapter("second")
        model.add_adapter("twin", copy.deepcopy(model.peft_config["default"]))
        randomize(model)
        model.add_weighted_adapter(
            ["default", "twin"], [0.7, 0.3], "mix", combination_type="linear"
        )
        model.set_adapter("mix")
    compare(*pair)


def test_the_dropouts_own_mode_counts(make, served, assert_same) -> None:
    fast = make("bert", lora_dropout=0.5)
    pelt_fast.accelerate(fast)
    fast.eval()
    layer = lora_layers(fast)[0]
    x = torch.randn(4, 32)
    still = layer(x)
    layer.lora_dropout.train()
    assert not torch.allclose(layer(x), still)
    layer.lora_dropout["default"].p = 0.0
    assert_same(layer(x), still)
    assert len(served) == 3


def test_requires_grad_is_read_at_call_time(pair, batch, assert_same) -> None:
    def freeze_a(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)

    change(pair, freeze_a)
    for model in pair:
        model(**batch).loss.backward()
    plain, fast = (dict(model.named_parameters()) for model in pair)
    for name, parameter in plain.items():
        assert (parameter.grad is None) == (fast[name].grad is None), name
        if parameter.grad is not None:
            assert_same(fast[name].grad, parameter.grad)


def test_a_base_weight_that_trains_gets_its_gradient(pair, batch, assert_same) -> None:
    for model in pair:
        lora_layers(model)[0].get_base_layer().weight.requires_grad_(True)
        model(**batch).loss.backward()
    plain, fast = (lora_layers(model)[0].get_base_layer().weight.grad for model in pair)
    assert_same(fast, plain)


def test_generation(make) -> None:
    plain = make("llama").eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    expected = plain.generate(input_ids=ids, **options)
    assert torch.equal(fast.generate(input_ids=ids, **options), expected)
