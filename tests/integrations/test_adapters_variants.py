"""UniPELT's variants on models of the adapters library: what is added, trained, accelerated, saved and loaded."""

import copy

import adapters
import pytest
import torch

import pelt_fast
from pelt_fast.nn import BitFit

from .adapters_models import plain_model
from .conftest import ARCHITECTURES

PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8)
ADAPTER = adapters.SeqBnConfig(reduction_factor=4)
LORA = adapters.LoRAConfig(r=4, alpha=16)
SMALL = {"A": {"adapter": ADAPTER}, "P": {"prefix_tuning": PREFIX}, "L": {"lora": LORA}}
KINDS = {
    "A": adapters.SeqBnConfig,
    "P": adapters.PrefixTuningConfig,
    "L": adapters.LoRAConfig,
}


def added(variant, architecture="bert"):
    model = plain_model(architecture)
    options = {}
    for letter in set(variant) - {"B"}:
        options |= SMALL[letter]
    return model, pelt_fast.add_unipelt(model, "task", variant, **options)


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def test_configs():
    assert pelt_fast.unipelt_config("APL") == adapters.UniPELTConfig()
    for variant in ("AP", "LA", "PL", "A", "APL"):
        union = pelt_fast.unipelt_config(variant)
        assert isinstance(union, adapters.ConfigUnion)
        assert {type(c) for c in union.configs} == {KINDS[letter] for letter in variant}
        assert all(c.use_gating for c in union.configs)
    (lora,) = pelt_fast.unipelt_config("L", lora=LORA, gating=False).configs
    assert lora == LORA


@pytest.mark.parametrize(
    ("variant", "options", "error", "message"),
    [
        ("APX", {}, ValueError, "variant is 'APX'; expected letters of A, P and L"),
        ("AAP", {}, ValueError, "variant is 'AAP'; expected letters"),
        ("B", {}, ValueError, "variant is 'B'; expected letters"),
        ("", {}, ValueError, "variant is ''; expected letters"),
        (None, {}, TypeError, "variant is a NoneType; expected a string"),
        ("APLB", {}, ValueError, r"pelt_fast\.add_unipelt adds both"),
        ("AP", {"lora": LORA}, ValueError, "lora is given; expected None, since variant 'AP'"),
    ],
)
def test_config_errors(variant, options, error, message):
    with pytest.raises(error, match=message):
        pelt_fast.unipelt_config(variant, **options)


def test_errors():
    with pytest.raises(
        TypeError, match=r"model is a Linear; expected a model after adapters\.init"
    ):
        pelt_fast.add_unipelt(torch.nn.Linear(2, 2), "task")
    model = plain_model("t5")
    with pytest.raises(ValueError, match="has no bias below its head"):
        pelt_fast.add_unipelt(model, "task", "APLB")
    assert "task" not in model.adapters_config


@pytest.mark.parametrize("variant", ["AP", "APL", "APLB"])
def test_a_step_of_each_is_the_library_s(variant):
    model, biases = added(variant)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model = model.eval().double()
    fast = copy.deepcopy(model)
    report = pelt_fast.accelerate(fast)
    assert not report.left
    assert not report.waiting
    assert set(report.idle.values()) <= {"no adapter is on this layer"}  # Pfeiffer's has one of two
    ours, theirs = (step(m, ARCHITECTURES["bert"].batch()) for m in (fast, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    of_biases = {f"bert.{name}" for name in BitFit(model, train=False).names}
    assert (biases is None) == (variant != "APLB")
    assert of_biases <= ours.keys() if biases else not of_biases & ours.keys()
    for part, letter in (("loras.", "L"), ("prefix_tunings.", "P"), (".adapters.", "A")):
        assert any(part in name for name in ours) == (letter in variant)


def test_files(tmp_path):
    model, biases = added("APLB")
    names = set(biases.names)
    assert not any("task" in name or "classifier" in name for name in names)
    original = copy.deepcopy(biases.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    pelt_fast.accelerate(model)
    model.save_adapter(str(tmp_path), "task", with_head=True)
    biases.save(tmp_path)
    batch = ARCHITECTURES["bert"].batch()
    other = plain_model("bert")
    other.load_adapter(str(tmp_path), set_active=True)
    loaded = BitFit(other, train=False)
    assert set(loaded.names) == names
    with torch.no_grad():
        other.eval()
        before = other(**batch).logits
        loaded.load(tmp_path)
        pelt_fast.accelerate(other)
        torch.testing.assert_close(other(**batch).logits, model.eval()(**batch).logits)
        loaded.restore()
        pelt_fast.restore(other)
        torch.testing.assert_close(other(**batch).logits, before)
    biases.restore()
    assert all(torch.equal(b, original[n]) for n, b in biases.state_dict().items())
    assert any(p.requires_grad for n, p in model.named_parameters() if "loras" in n)
    assert not any(p.requires_grad for p in biases.parameters())
