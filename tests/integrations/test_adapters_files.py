"""An accelerated model is stored, copied and restored as if nothing had been done to it."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import pytest

pytest.importorskip("adapters")

import accelerate.hooks
import torch
from adapters.composition import Stack
from adapters.methods.bottleneck import BottleneckLayer
from torch import nn

import pelt_fast

from .adapters_models import HOULSBY, LAYERS, adapted, bottleneck_layers, plain_model
from .conftest import ARCHITECTURES
from .parity import assert_equal_but_for_rounding

BATCH = ARCHITECTURES["bert"].batch()
GATED = HOULSBY.replace(use_gating=True, ln_before=True, ln_after=True, scaling="channel")


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def plain() -> nn.Module:
    model = adapted("bert", GATED, "par_bn")
    model(**BATCH).loss.backward()
    return model.eval()


@pytest.fixture
def fast(plain: nn.Module) -> nn.Module:
    fast = copy.deepcopy(plain)
    assert len(pelt_fast.accelerate(fast).replaced) == 4
    return fast


def test_state_dict_has_the_same_keys_and_tensors(plain, fast) -> None:
    expected, actual = plain.state_dict(), fast.state_dict()
    assert list(expected) == list(actual)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_parameters_are_the_same_objects(plain) -> None:
    before = dict(plain.named_parameters())
    pelt_fast.accelerate(plain)
    after = dict(plain.named_parameters())
    assert list(before) == list(after)
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("architecture", LAYERS)
def test_what_is_saved_is_the_same_bytes(architecture, tmp_path) -> None:
    model = adapted(architecture, HOULSBY, "par_bn")
    for name in ("plain", "fast"):
        (tmp_path / name / "model").mkdir(
            parents=True
        )  # for models by interface the library does not
        model.save_all_adapters(tmp_path / name / "adapters")
        model.save_pretrained(tmp_path / name / "model")
        pelt_fast.accelerate(model)
    expected = hashes(tmp_path / "plain")
    assert {"adapters/a/adapter_config.json", "adapters/b/pytorch_adapter.bin"} <= set(expected)
    assert hashes(tmp_path / "fast") == expected


def test_a_checkpoint_moves_both_ways(plain, fast, tmp_path, fused) -> None:
    with torch.no_grad():
        fast(**BATCH)  # so that whatever a backend keeps of the old weights is there to be stale
        for name, parameter in plain.named_parameters():
            if ".adapters.a." in name:
                parameter.mul_(-1.5)
        expected = plain(**BATCH).logits
        plain.save_adapter(tmp_path / "plain", "a")
        fast.load_adapter(str(tmp_path / "plain"), load_as="loaded", set_active=True)
        fast.eval()
        assert_equal_but_for_rounding(fast(**BATCH).logits, expected)
        fast.save_adapter(tmp_path / "fast", "loaded")
        fresh = plain_model()
        fresh.load_state_dict(
            {k: v for k, v in plain.state_dict().items() if ".adapters." not in k}, strict=False
        )
        fresh.load_adapter(str(tmp_path / "fast"), set_active=True)
        assert_equal_but_for_rounding(fresh.eval()(**BATCH).logits, expected)
        fast.load_adapter(str(tmp_path / "plain"), load_as="a", set_active=True)
        fast.eval()
        assert_equal_but_for_rounding(fast(**BATCH).logits, expected)
    assert fused == ["block"] * 12


def test_restore_is_exact(plain) -> None:
    def contents(model: nn.Module) -> list[dict]:
        return [copy.copy(module.__dict__) for module in model.modules()]

    types, before = [type(module) for module in plain.modules()], contents(plain)
    pelt_fast.accelerate(plain)
    assert [type(module) for module in plain.modules()] != types
    assert pelt_fast.restore(plain) == 4
    assert [type(module) for module in plain.modules()] == types
    for now, then in zip(contents(plain), before, strict=True):
        assert list(now) == list(then)
        assert all(now[key] is then[key] for key in then)
    assert pelt_fast.restore(plain) == 0


def test_restored_layers_are_not_served(fast, fused) -> None:
    pelt_fast.restore(fast)
    fast(**BATCH)
    assert not fused


def test_no_class_is_touched(fast) -> None:
    assert BottleneckLayer.bottleneck_layer_forward.__module__ == "adapters.methods.bottleneck"
    other = adapted("bert")
    assert not any("pelt_fast" in type(module).__module__ for module in other.modules())


def test_copies_are_accelerated_and_independent(fast, fused) -> None:
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        assert torch.equal(twin(**BATCH).logits, fast(**BATCH).logits)
        assert fused == ["block"] * 8
        before = fast(**BATCH).logits
        bottleneck_layers(twin)[0].adapters["a"].adapter_up.weight.mul_(3)
        twin.set_active_adapters("b")
        assert not torch.equal(twin(**BATCH).logits, before)
        assert torch.equal(fast(**BATCH).logits, before)
    assert pelt_fast.restore(twin) == 4
    assert pelt_fast.restore(fast) == 4


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("architecture", ["bert", "qwen2"])
def test_pickles_of_a_layer(architecture, how, tmp_path, fused) -> None:
    # of a whole model the library's own classes are made at run time, and cannot be pickled
    model = adapted(architecture).eval()
    pelt_fast.accelerate(model)
    layer = bottleneck_layers(model)[-1]
    if how == "pickle":
        twins = [pickle.loads(pickle.dumps(layer, protocol)) for protocol in range(2, 6)]
    else:
        torch.save(layer, tmp_path / "layer.pt")
        twins = [torch.load(tmp_path / "layer.pt", weights_only=False)]
    o, x = torch.randn(2, 3, 5, 32)
    norm = nn.LayerNorm(32)
    for twin in twins:
        assert type(twin) is type(layer)
        y = layer.bottleneck_layer_forward(o, x, norm)
        assert torch.equal(twin.bottleneck_layer_forward(o, x, norm), y)
        assert pelt_fast.restore(twin) == 1
        assert type(twin) in type(layer).__mro__
    assert len(fused) == 2 * len(twins)


def test_replicas_of_data_parallel(fast, fused) -> None:
    # what torch.nn.parallel.replicate does to each module, without its GPUs
    layer = bottleneck_layers(fast)[-1]
    o, x = torch.randn(2, 3, 5, 32)

    def replica(module: nn.Module) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(twin, name, None if child is None else replica(child))
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter * 1)
        return twin

    expected = layer.bottleneck_layer_forward(o, x, layer.LayerNorm)
    twin = replica(layer)
    assert torch.equal(twin.bottleneck_layer_forward(o, x, twin.LayerNorm), expected)
    assert fused == ["block"] * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_hugging_face_accelerate(when, plain, fused) -> None:
    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    layer, (o, x) = bottleneck_layers(plain)[-1], torch.randn(2, 3, 5, 32)
    o = torch.randn(3, 5, layer.dense.in_features)
    untouched = dict(layer.__dict__)
    expected = layer(o, x) * 2
    if when == "before":
        accelerate.hooks.add_hook_to_module(layer, Doubling())
        pelt_fast.accelerate(plain)
    else:
        pelt_fast.accelerate(plain)
        accelerate.hooks.add_hook_to_module(layer, Doubling())
    assert_equal_but_for_rounding(layer(o, x), expected)
    assert fused == ["block"]
    pelt_fast.restore(plain)
    assert torch.equal(layer(o, x), expected)
    accelerate.hooks.remove_hook_from_module(layer)
    assert layer.__dict__ == {**untouched, "forward": layer.forward}


def test_hooks_on_an_accelerated_layer_run(fast) -> None:
    layer, seen = bottleneck_layers(fast)[-1], []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: seen.append("post"))
    fast(**BATCH)
    assert seen == ["pre", "post"]


def test_restore_refuses_a_class_that_another_library_put_on_top(fast) -> None:
    layers = bottleneck_layers(fast)
    accelerated = type(layers[3])
    layers[3].__class__ = type("Sharded", (accelerated,), {})
    with pytest.raises(RuntimeError, match=r"has since made it a Sharded; undo that first"):
        pelt_fast.restore(fast)
    assert "pelt_fast" in type(layers[0]).__module__, "something was restored before the error"
    layers[3].__class__ = accelerated
    assert pelt_fast.restore(fast) == 4


def test_adapters_of_a_whole_setup_load_again(fast, tmp_path) -> None:
    fast.set_active_adapters(Stack("a", "b"))
    expected = fast(**BATCH).logits
    fast.save_adapter_setup(tmp_path, fast.active_adapters)
    fast.delete_adapter("a")
    fast.delete_adapter("b")
    fast.load_adapter_setup(str(tmp_path), set_active=True)
    assert torch.equal(fast.eval()(**BATCH).logits, expected)
