"""LoRA and UniPELT of the adapters library: accelerated against plain, with every parameter drawn at random."""

import copy
import math

import adapters
import pytest
import torch
from adapters.composition import BatchSplit, Stack

import pelt_fast
from pelt_fast.integrations.adapters_lora import FastLoRALinear

from .adapters_models import plain_model
from .conftest import ARCHITECTURES

LORA = adapters.LoRAConfig(r=4, alpha=16, attn_matrices=["q", "v"], intermediate_lora=True)
GATED = adapters.LoRAConfig(r=4, alpha=16, use_gating=True, attn_matrices=["q", "k"])
UNIPELT = adapters.ConfigUnion(
    adapters.LoRAConfig(r=4, use_gating=True),
    adapters.PrefixTuningConfig(prefix_length=3, use_gating=True),
    adapters.SeqBnConfig(reduction_factor=4, use_gating=True),
)


def adapted(architecture="bert", *configs):
    """A model with adapters "a", "b", ...; "a" active and in training, as is the token embedding."""
    model = plain_model(architecture)
    for i, config in enumerate(configs or (LORA,)):
        model.add_adapter(chr(ord("a") + i), config=config)
    model.train_adapter("a")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora", "gate", "adapter", "prefix")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise / math.sqrt(parameter.shape[-1])
    model.get_input_embeddings().weight.requires_grad_(True)
    return model.eval().double()  # so that nothing is left of the order of sums


def fast_of(model):
    fast = copy.deepcopy(model)
    report = pelt_fast.accelerate(fast)
    return fast, report


def loras(model):
    return [m for m in model.modules() if isinstance(m, FastLoRALinear) and len(m.loras)]


def inputs_of(architecture):
    return ARCHITECTURES[architecture].batch()


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def assert_same(ours, theirs, tolerance=1e-9):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        size = value.double().norm().clamp_min(1e-6)
        assert (ours[name].double() - value.double()).norm() <= tolerance * size, name


@pytest.mark.parametrize("architecture", ["bert", "roberta", "t5", "gpt2", "llama"])
@pytest.mark.parametrize("config", [LORA, GATED], ids=["lora", "gated"])
def test_outputs_and_gradients(architecture, config):
    model = adapted(architecture, config)
    fast, report = fast_of(model)
    batch = inputs_of(architecture)
    # GPT-2's one projection for q, k and v is another class of the library's
    assert loras(fast) or architecture == "gpt2"
    assert bool(report.left) == (architecture == "gpt2")
    assert_same(step(fast, batch), step(model, batch))


def test_unipelt_whole():
    """LoRA, adapter and prefix with their gates, in one model, with padding."""
    model = adapted("bert", UNIPELT)
    fast, report = fast_of(model)
    assert not report.left
    assert any("gated" in kind and "LoRA" in kind for kind in report.kinds)
    batch = inputs_of("bert")
    assert_same(step(fast, batch), step(model, batch))


def test_three_optimizer_steps():
    model = adapted("bert", GATED)
    fast, _ = fast_of(model)
    batches = [ARCHITECTURES["bert"].batch(seed=seed) for seed in range(3)]
    losses = []
    for each in (model, fast):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        losses.append([])
        for batch in batches:
            optimizer.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)


def test_what_is_active_is_read_at_each_call():
    # on the same layers, which are square: elsewhere the library's BatchSplit and Stack fail
    square = adapters.LoRAConfig(r=4, attn_matrices=["q", "v"])
    model = adapted("bert", square, square.replace(use_gating=True))
    fast, _ = fast_of(model)
    batch = inputs_of("bert")
    for setup in ("a", "b", None, Stack("a", "b"), BatchSplit("a", "b", batch_sizes=[1, 2])):
        for each in (model, fast):
            each.set_active_adapters(setup)
        with torch.no_grad():
            torch.testing.assert_close(fast(**batch).logits, model(**batch).logits)
    fast.set_active_adapters("a")
    fast.merge_adapter("a")
    with torch.no_grad():
        merged = fast(**batch).logits
    fast.reset_adapter()
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, merged)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (adapters.IA3Config(), "IA3"),
        (adapters.LoRAConfig(r=4, use_dora=True), "DoRA"),
        (adapters.VeraConfig(r=4), "Vera"),
    ],
    ids=["ia3", "dora", "vera"],
)
def test_what_is_left_says_why(config, reason):
    model = adapted("bert", config)
    fast, report = fast_of(model)
    assert any(reason in why for why in report.waiting.values()), report
    batch = inputs_of("bert")
    assert_same(step(fast, batch), step(model, batch))


def test_gating_scores_are_the_librarys():
    model = adapted("bert", GATED)
    fast, _ = fast_of(model)
    batch = inputs_of("bert")
    scores = []
    for each in (model, fast):
        with torch.no_grad():
            output = each(**batch, output_adapter_gating_scores=True)
        scores.append(output.adapter_gating_scores["a"])
    assert scores[0].keys() == scores[1].keys()
    for index, places in scores[0].items():
        for place, score in places.items():
            torch.testing.assert_close(torch.tensor(scores[1][index][place]), torch.tensor(score))


def test_dropout_acts_on_the_way_into_a():
    model = adapted("bert", adapters.LoRAConfig(r=4, dropout=0.5, use_gating=True))
    fast, _ = fast_of(model)
    layer = loras(fast)[0].train()
    x = torch.randn(2, 7, layer.in_features, dtype=torch.float64)
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_files_and_restore(tmp_path):
    model = adapted("bert", UNIPELT)
    fast, _ = fast_of(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    for each, folder in ((model, "plain"), (fast, "fast")):
        each.save_adapter(tmp_path / folder, "a")
    for file in (tmp_path / "plain").iterdir():
        if file.suffix == ".json":
            assert file.read_bytes() == (tmp_path / "fast" / file.name).read_bytes()
    pelt_fast.restore(fast)
    assert not loras(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]


def test_half_precision_base_with_float32_adapters():
    model = adapted("bert", LORA)
    for name, parameter in model.named_parameters():
        dtype = torch.float32 if "lora" in name else torch.bfloat16
        parameter.data = parameter.data.to(dtype)
    fast, _ = fast_of(model)
    output = fast(**inputs_of("bert"))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert fast.get_input_embeddings().weight.grad.isfinite().all()
