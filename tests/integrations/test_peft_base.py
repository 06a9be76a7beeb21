"""Layers of the base model in an accelerated PEFT model: linear layers that are frozen, and dropouts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

import pelt_fast
from pelt_fast.integrations import base_layers
from pelt_fast.integrations.base_layers import FAST_BASE, FastDropout, FastLinear

from .parity import AUTOCAST, BF16, FP32, assert_as_accurate, one_step, pairs

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
FROZEN = {"bert": 2 * 4 + 1, "llama": 2 * 5 + 1}  # of two layers and the pooler, or the head


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of the linear layers that computed with ``frozen_linear`` so far."""
    weights: list[Tensor] = []
    theirs = base_layers.frozen_linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weights.append(weight)
        return theirs(x, weight, bias)

    monkeypatch.setattr(base_layers, "frozen_linear", spy)
    return weights


@pytest.fixture
def make_few(make) -> Callable[..., nn.Module]:
    """make_few(architecture, ...): a model in which few of the linear layers have a LoRA."""

    def make_few(name: str = "bert", *args, **options) -> nn.Module:
        options = {"target_modules": TARGETS[name], **options}
        if name == "bert":
            options.setdefault("modules_to_save", ["classifier"])
        return make(name, *args, **options)

    return make_few


def fast_base(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FAST_BASE)}


@pairs(["bert", "llama"], [FP32, BF16, AUTOCAST], always=[FP32, BF16])
def test_a_step(name, precision, make_few, architectures, frozen) -> None:
    arch = architectures[name]
    plain = make_few(name, precision.weights, precision.adapters_fp32)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    pelt_fast.accelerate(fast)
    batch = arch.batch()
    right = one_step(exact, batch)
    with precision():
        theirs = one_step(plain, batch)
        assert not frozen
        ours = one_step(fast, batch)
    assert len(frozen) == FROZEN[name]
    assert_as_accurate(ours, theirs, right, precision.computed, 15)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_finds_the_same_bits(
    name, reentrant, make_few, architectures, frozen
) -> None:
    model = make_few(name)
    pelt_fast.accelerate(model)
    for module in model.modules():
        if isinstance(module, FastDropout):
            module.p = 0.2
    batch = architectures[name].batch()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        frozen.clear()
        torch.manual_seed(3)
        results.append(one_step(model, batch))
    assert len(frozen) > FROZEN[name], "nothing ran again"
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


def test_generate(make_few, frozen) -> None:
    plain = make_few("llama").eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    ids = torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    options["attention_mask"] = torch.ones_like(ids)
    expected = plain.generate(input_ids=ids, **options)
    assert not frozen
    assert torch.equal(fast.generate(input_ids=ids, **options), expected)
    assert len(frozen) == 6 * FROZEN["llama"]


def test_a_target_whose_adapter_is_off(
    make_few, architectures, frozen, served, assert_same
) -> None:
    plain, batch = make_few("llama").eval(), architectures["llama"].batch()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    with torch.no_grad(), plain.disable_adapter(), fast.disable_adapter():
        assert_same(fast(**batch).logits, plain(**batch).logits)
    assert len(frozen) == FROZEN["llama"] + 4
    assert not served
    frozen.clear()
    with torch.no_grad():
        fast(**batch)
    assert len(frozen) == FROZEN["llama"]
    assert len(served) == 4
    for model in (plain, fast):
        model.merge_adapter()
    with torch.no_grad():
        assert_same(fast(**batch).logits, plain(**batch).logits)


def test_which_layers_and_back(make_few) -> None:
    model = make_few(lora_dropout=0.1)
    layers = model.base_model.model.bert.encoder.layer
    layers[0].output.dense.weight.requires_grad_(True)
    layers[1].output.dense.__class__ = type("Quantized", (nn.Linear,), {})
    layers[0].intermediate.dense.forward = lambda x: x
    before = {name: type(module) for name, module in model.named_modules()}
    report = pelt_fast.accelerate(model)
    fast = {name.removeprefix("base_model.model.") for name in fast_base(model)}
    linears = {
        *(f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("key",)),
        *(f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)),
        *("bert.encoder.layer.1.intermediate.dense", "bert.pooler.dense"),
        *(
            f"bert.encoder.layer.{i}.attention.self.{part}.base_layer"
            for i in (0, 1)
            for part in ("query", "value")
        ),
    }
    dropouts = {
        *("bert.embeddings.dropout", "dropout"),
        *(f"bert.encoder.layer.{i}.attention.self.dropout" for i in (0, 1)),
        *(f"bert.encoder.layer.{i}.attention.output.dropout" for i in (0, 1)),
        *(f"bert.encoder.layer.{i}.output.dropout" for i in (0, 1)),
    }
    assert fast == linears | dropouts
    assert not fast & {*report.replaced, *report.left}
    assert report.fast == {"LoRA linear": 4}
    # those below a LoRA are the LoRA's
    assert report.base == {"frozen linear": len(linears) - 4, "dropout": len(dropouts)}
    assert str(report).startswith(
        "pelt_fast: fast are 4 LoRA linears of PEFT, and of the base model 8 dropouts, 6 frozen linears\n  4 x 32 -> 32"
    )
    layers[0].attention.self.key.weight.requires_grad_(True)
    assert pelt_fast.accelerate(model).base["frozen linear"] == len(linears) - 5
    layers[0].attention.self.key.weight.requires_grad_(False)
    for module in fast_base(model).values():
        assert type(pickle.loads(pickle.dumps(module))) is type(module)
    assert pelt_fast.restore(model) == 4
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_dropouts_are_torchs(make_few, architectures) -> None:
    plain = make_few()
    for module in plain.modules():
        if type(module) is nn.Dropout:
            module.p = 0.3
    fast = copy.deepcopy(plain.train())
    pelt_fast.accelerate(fast)
    results = []
    for model in (plain, fast):
        torch.manual_seed(5)
        results.append(one_step(model, architectures["bert"].batch()))
        results[-1]["next"] = torch.rand(1)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train(bias, make_few, architectures) -> None:
    plain, batch = make_few("bert", bias=bias), architectures["bert"].batch()
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    pelt_fast.accelerate(fast)
    right, theirs, ours = (one_step(model, batch) for model in (exact, plain, fast))
    assert any(key.endswith("key.bias") for key in ours) == (bias == "all")
    assert_as_accurate(ours, theirs, right, torch.float32, 15)


def test_a_weight_that_trains_later(make_few, architectures, assert_same) -> None:
    plain, batch = make_few(), architectures["bert"].batch()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    one_step(fast, batch)  # so that a pack is kept
    for step in range(2):
        results = []
        for model in (plain, fast):
            dense = model.base_model.model.bert.encoder.layer[0].output.dense
            dense.weight.requires_grad_(step == 0)
            results.append(one_step(model, batch))
            with torch.no_grad():
                dense.weight.mul_(-2)
        theirs, ours = results
        assert any(key.endswith("layer.0.output.dense.weight") for key in ours) == (step == 0)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value, key)


@pytest.mark.parametrize("trained", [False, True])
def test_tied_head(trained, make_few, architectures, assert_same) -> None:
    plain = make_few("llama")
    core = plain.base_model.model
    core.lm_head.weight = core.model.embed_tokens.weight
    core.lm_head.weight.requires_grad_(trained)
    fast, batch = copy.deepcopy(plain), architectures["llama"].batch()
    pelt_fast.accelerate(fast)
    head = fast.base_model.model.lm_head
    assert head.weight is fast.base_model.model.model.embed_tokens.weight
    assert isinstance(head, FastLinear) == (not trained)
    for _ in range(2):
        theirs, ours = one_step(plain, batch), one_step(fast, batch)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value, key, 15)
        for model in (plain, fast):
            with torch.no_grad():
                model.base_model.model.model.embed_tokens.weight.mul_(-0.5)


def unload(model: nn.Module) -> nn.Module:
    return model.unload()


def merge_and_unload(model: nn.Module) -> nn.Module:
    return model.merge_and_unload()


def add_on_a_base_layer(model: nn.Module) -> nn.Module:
    torch.manual_seed(6)
    config = peft.LoraConfig(
        r=2, target_modules=["key", "dense"], init_lora_weights=False, modules_to_save=["pooler"]
    )
    model.add_adapter("wide", config)
    model.set_adapter("wide")
    return model


def delete(model: nn.Module) -> nn.Module:
    add_on_a_base_layer(model)
    model.delete_adapter("default")
    return model


@pytest.mark.parametrize("change", [unload, merge_and_unload, add_on_a_base_layer, delete])
def test_what_peft_does_afterwards(change, make_few, architectures, assert_same) -> None:
    plain, batch = make_few(), architectures["bert"].batch()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    with torch.no_grad():
        fast(**batch)
    plain, fast = change(plain), change(fast)
    theirs, ours = one_step(plain, batch), one_step(fast, batch)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_same(ours[key], value, key)
    assert list(fast.state_dict()) == list(plain.state_dict())
    pelt_fast.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]


def test_files_are_loaded(make_few, architectures, tmp_path, assert_same) -> None:
    plain, batch = make_few().eval(), architectures["bert"].batch()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.mul_(-2)
        plain.save_pretrained(tmp_path)
        fast.load_adapter(tmp_path, "loaded")
        fast.set_adapter("loaded")
        assert_same(fast(**batch).logits, plain(**batch).logits)


def test_other_tuners_have_fast_base_layers_too(assert_same) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    config = peft.LoHaConfig(target_modules=["0"], r=2, init_weights=False)
    plain = peft.get_peft_model(model, config)
    fast, x = copy.deepcopy(plain), torch.randn(3, 8)
    pelt_fast.accelerate(fast)
    assert {name.rpartition(".model.")[2] for name in fast_base(fast)} == {"0.base_layer", "1"}
    assert_same(fast(x), plain(x))
    assert pelt_fast.restore(fast) == 0
    assert not fast_base(fast)


def test_restore_refuses_a_class_on_top_of_a_base_layer(make_few) -> None:
    model = make_few()
    pelt_fast.accelerate(model)
    layer = model.base_model.model.bert.pooler.dense
    fast = type(layer)
    layer.__class__ = type("Sharded", (fast,), {})
    with pytest.raises(RuntimeError, match=r"pooler.dense.* made it a Sharded"):
        pelt_fast.restore(model)
    layer.__class__ = fast
    assert pelt_fast.restore(model) == 4


@pytest.mark.slow
def test_compile(make_few, architectures, assert_same) -> None:
    model, batch = make_few().eval(), architectures["bert"].batch()
    batch.pop("labels")
    expected = model(**batch).logits
    pelt_fast.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(**batch).logits, expected)


def test_lora_layers_alone(assert_same) -> None:
    layer = lora.Linear(nn.Linear(8, 4), "a", peft.LoraConfig(r=2, init_lora_weights=False), r=2)
    layer.requires_grad_(False)
    x = torch.randn(3, 8)
    expected = layer(x)
    pelt_fast.accelerate(layer)
    assert_same(layer(x), expected)
    layer.enable_adapters(False)
    assert_same(layer(x), layer.base_layer(x))
