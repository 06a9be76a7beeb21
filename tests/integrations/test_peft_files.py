"""An accelerated model is stored, copied and restored as if nothing had been done to it."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import accelerate.hooks
import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn

import pelt_fast


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def lora_layers(model: nn.Module) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


@pytest.fixture
def plain(make, architectures) -> nn.Module:
    model = make("bert", modules_to_save=["classifier"], lora_dropout=0.1)
    model(**architectures["bert"].batch()).loss.backward()
    return model.eval()


@pytest.fixture
def fast(plain: nn.Module) -> nn.Module:
    fast = copy.deepcopy(plain)
    assert len(pelt_fast.accelerate(fast).replaced) == 13
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


@pytest.mark.parametrize("architecture", ["bert", "roberta", "t5", "gpt2", "llama"])
def test_save_pretrained_writes_the_same_bytes(architecture, make, tmp_path) -> None:
    # one model, not a copy: PEFT writes its set of targets in the order of that very set
    model = make(architecture)
    model.save_pretrained(tmp_path / "plain")
    pelt_fast.accelerate(model)
    model.save_pretrained(tmp_path / "fast")
    expected = hashes(tmp_path / "plain")
    assert any(name.endswith(".safetensors") for name in expected)
    assert hashes(tmp_path / "fast") == expected


def test_a_checkpoint_moves_both_ways(
    plain, fast, make, architectures, assert_same, tmp_path
) -> None:
    batch = architectures["bert"].batch()
    with torch.no_grad():
        fast(**batch)  # so that whatever a backend keeps of the old weights is there to be stale
        for name, parameter in plain.named_parameters():
            if ".lora_" in name:
                parameter.mul_(-2)
        plain.save_pretrained(tmp_path)
        fast.load_adapter(tmp_path, "loaded")
        fast.set_adapter("loaded")
        assert_same(fast(**batch).logits, plain(**batch).logits)
        fast.load_state_dict({**fast.state_dict(), **plain.state_dict()})
        fast.set_adapter("default")
        assert_same(fast(**batch).logits, plain(**batch).logits)
        base = plain.unload()
        fresh = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        pelt_fast.accelerate(fresh)
        assert_same(fresh(**batch).logits, fast(**batch).logits)


def test_restore_is_exact(plain) -> None:
    def contents(model: nn.Module) -> list[dict]:
        return [copy.copy(module.__dict__) for module in model.modules()]

    types, before = [type(module) for module in plain.modules()], contents(plain)
    pelt_fast.accelerate(plain)
    assert [type(module) for module in plain.modules()] != types
    assert pelt_fast.restore(plain) == 13
    assert [type(module) for module in plain.modules()] == types
    for now, then in zip(contents(plain), before, strict=True):
        assert list(now) == list(then)
        assert all(now[key] is then[key] for key in then)
    assert pelt_fast.restore(plain) == 0


def test_restored_layers_are_not_served(fast, architectures, served) -> None:
    pelt_fast.restore(fast)
    fast(**architectures["bert"].batch())
    assert not served


def test_no_class_is_touched(fast) -> None:
    assert lora.Linear.forward.__module__ == "peft.tuners.lora.layer"
    other = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4))
    )
    assert type(other[0]) is lora.Linear


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(how, fast, architectures, served, tmp_path) -> None:
    batch = architectures["bert"].batch()
    if how == "deepcopy":
        twin = copy.deepcopy(fast)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        torch.save(fast, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, fast(**batch).logits)
        assert len(served) == 2 * 13
        before = fast(**batch).logits
        lora_layers(twin)[0].lora_B["default"].weight.mul_(3)
        assert not torch.equal(twin(**batch).logits, before)
        assert torch.equal(fast(**batch).logits, before)
    assert pelt_fast.restore(twin) == 13
    assert pelt_fast.restore(fast) == 13


def test_replicas_of_data_parallel(fast) -> None:
    # what torch.nn.parallel.replicate does to each module, without its GPUs
    layer = lora_layers(fast)[0]
    x = torch.randn(3, 32)

    def replica(module: nn.Module) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(twin, name, replica(child))
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter * 1)
        return twin

    assert torch.equal(replica(layer)(x), layer(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_hugging_face_accelerate(when, plain, served) -> None:
    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    layer, x = lora_layers(plain)[0], torch.randn(3, 32)
    untouched = dict(layer.__dict__)
    expected = layer(x) * 2
    if when == "before":
        accelerate.hooks.add_hook_to_module(layer, Doubling())
        hooked = dict(layer.__dict__)
        pelt_fast.accelerate(plain)
    else:
        pelt_fast.accelerate(plain)
        accelerate.hooks.add_hook_to_module(layer, Doubling())
    torch.testing.assert_close(layer(x), expected)
    assert len(served) == 1
    pelt_fast.restore(plain)
    assert torch.equal(layer(x), expected)
    assert len(served) == 1
    if when == "before":
        assert layer.__dict__ == hooked
    accelerate.hooks.remove_hook_from_module(layer)
    assert layer.__dict__ == {**untouched, "forward": layer.forward}
    assert layer.forward.__func__ is lora.Linear.forward


def test_hooks_on_an_accelerated_layer_run(fast) -> None:
    layer, seen = lora_layers(fast)[0], []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: seen.append("post"))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    layer(torch.randn(3, 32, requires_grad=True)).sum().backward()
    assert seen == ["pre", "post", "backward"]


def test_restore_refuses_a_class_that_another_library_put_on_top(fast) -> None:
    layers = lora_layers(fast)
    outer = type("Sharded", (type(layers[3]),), {})
    layers[3].__class__ = outer
    with pytest.raises(RuntimeError, match=r"has since made it a Sharded; undo that first"):
        pelt_fast.restore(fast)
    accelerated = type(layers[0])
    assert accelerated is not lora.Linear, "something was restored before the error"
    layers[3].__class__ = accelerated
    assert pelt_fast.restore(fast) == 13
