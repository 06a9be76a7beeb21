"""``accelerate(model, compat="paper")``: gates over real tokens, whatever a batch is padded to, and what is refused."""

import copy
import functools
import math

import adapters
import pytest
import torch
from adapters.composition import BatchSplit, Parallel, Stack
from torch import nn

import pelt_fast

from .adapters_models import plain_model, randomize
from .conftest import ARCHITECTURES

UNIPELT = pelt_fast.unipelt_config(
    "APL",
    prefix_tuning=adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
    adapter=adapters.SeqBnConfig(reduction_factor=4),
    lora=adapters.LoRAConfig(r=4, alpha=16),
)
TOKENS = 5  # of the sample that is padded


def adapted(architecture="bert", config=UNIPELT, dtype=torch.float64):
    model = plain_model(architecture)
    for name in "ab":
        model.add_adapter(name, config=config)
    model.train_adapter("a")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora", "gate", "adapter", "prefix")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise / math.sqrt(parameter.shape[-1])
    return model.eval().to(dtype)


def padded(length, left=False):
    """A batch whose first sample has TOKENS real tokens, whatever the length."""
    torch.manual_seed(0)
    ids = torch.randint(3, 61, (2, 16))[:, :length]
    mask = torch.ones_like(ids)
    mask[0, TOKENS:] = 0
    if left:
        ids[0] = ids[0].roll(length - TOKENS)
        mask[0] = mask[0].roll(length - TOKENS)
    return {"input_ids": ids, "attention_mask": mask}


def result_of_sample(model, length, **more):
    with torch.no_grad():
        output = model(**padded(length), output_hidden_states=True, **more)
    return output.hidden_states[-1][0, :TOKENS]


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_result_does_not_depend_on_padding(architecture):
    model = adapted(architecture)
    fast = copy.deepcopy(model)
    assert pelt_fast.accelerate(fast).compat == "adapters"
    theirs = result_of_sample(model, 12)
    torch.testing.assert_close(result_of_sample(fast, 12), theirs)
    assert (theirs - result_of_sample(fast, 7)).norm() > 1e-2

    report = pelt_fast.accelerate(fast, compat="paper")
    assert "compat='paper'" in str(report).splitlines()[0]
    alone = result_of_sample(fast, TOKENS)
    for length in (7, 12, 16):
        torch.testing.assert_close(result_of_sample(fast, length), alone, rtol=1e-10, atol=1e-10)
    assert (alone - result_of_sample(model, TOKENS)).norm() > 1e-2  # alpha / r

    assert pelt_fast.accelerate(fast).compat == "paper"  # it stays
    assert pelt_fast.accelerate(fast, compat="adapters").compat == "adapters"
    torch.testing.assert_close(result_of_sample(fast, 12), theirs)


def naive_paper(model):
    """The library's own forward with the paper's formula in its place, from the parameters."""
    mask = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: mask.append(kwargs["attention_mask"]), with_kwargs=True
    )

    class Gate(nn.Module):  # the library takes the sigmoid of what this gives, and then the mean
        def __init__(self, gate):
            super().__init__()
            self.gate = gate

        def forward(self, x):
            real = mask[-1].to(x.dtype)[..., None]
            mean = (torch.sigmoid(self.gate(x)) * real).sum(1, keepdim=True) / real.sum(1, True)
            return torch.logit(mean).expand(-1, x.shape[1], -1)

    for name, module in list(model.named_modules()):
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".gate"):
            owner.gate = Gate(module)
        elif name.endswith(("prefix_gates.a", "prefix_gates.b")):
            owner[name[-1]] = Gate(module)
        if name.split(".")[-2:-1] == ["loras"]:
            module.lora_B.data *= module.scaling
    return model


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.logits.square().sum().backward()
    grads = {
        n.replace(".gate.gate.", ".gate.").replace(
            "prefix_gates.a.gate.", "prefix_gates.a."
        ): p.grad
        for n, p in model.named_parameters()
        if p.grad is not None and "lora_B" not in n  # scaled there
    }
    return output.logits.detach(), grads


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_formula_s(checkpointing):
    model = adapted()
    fast, naive = copy.deepcopy(model), naive_paper(copy.deepcopy(model))
    pelt_fast.accelerate(fast, compat="paper")
    if checkpointing:
        fast.train().gradient_checkpointing_enable()
    batch = padded(12)
    (ours, grads), (theirs, expected) = step(fast, batch), step(naive, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    missing = expected.keys() - grads.keys()
    assert not missing
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-8, atol=1e-9, msg=name)
    for part in ("loras.a.gate.", "adapters.a.gate.", "prefix_gates.a."):
        assert any(part in name for name in expected)


def test_decoders_and_the_bare_model():
    fast = adapted("llama")
    pelt_fast.accelerate(fast, compat="paper")
    with torch.no_grad():
        found = [
            fast(**padded(n, left=True), position_ids=torch.arange(16 - n, 16).expand(2, n)).logits[
                0, -1
            ]
            for n in (7, 12)
        ]
    torch.testing.assert_close(*found)
    bare = adapted().base_model
    pelt_fast.accelerate(bare, compat="paper")
    batch = padded(7)
    with torch.no_grad():
        by_name = bare(**batch).last_hidden_state[0, :TOKENS]
        by_place = bare(*padded(12).values()).last_hidden_state[0, :TOKENS]
        whole = bare(batch["input_ids"]).last_hidden_state[0, :TOKENS]
    torch.testing.assert_close(by_name, by_place)
    assert (whole - by_name).norm() > 1e-3  # without a mask every token is real


def test_half_precision():
    fast = adapted(dtype=torch.bfloat16)
    wide = adapted()
    for each in (fast, wide):
        pelt_fast.accelerate(each, compat="paper")
    found, expected = result_of_sample(fast, 12), result_of_sample(wide, 12)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.1)


def test_parallel_repeats_the_mask():
    config = adapters.SeqBnConfig(reduction_factor=4, use_gating=True)
    model = plain_model()
    for name in "abc":
        model.add_adapter(name, config=config)
    randomize(model)
    model.eval().double()
    pelt_fast.accelerate(model, compat="paper")
    found = []
    for length in (7, 12):
        model.set_active_adapters(Stack("c", Parallel("a", "b")))
        with torch.no_grad():
            state = model.base_model(**padded(length)).last_hidden_state
        assert len(state) == 4
        found.append(state[[0, 2], :TOKENS])
    torch.testing.assert_close(*found)


def test_restore_and_copies():
    model = adapted()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    pelt_fast.accelerate(model, compat="paper")
    alone = result_of_sample(model, TOKENS)
    torch.testing.assert_close(result_of_sample(copy.deepcopy(model), 12), alone)
    pelt_fast.restore(model)
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert all(before[n].keys() == after[n].keys() for n in before)
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks
    assert not model.base_model._forward_hooks_always_called
    torch.testing.assert_close(result_of_sample(adapted(), 12), result_of_sample(model, 12))


def test_nothing_is_left_behind_by_an_error():
    fast, other = adapted(), adapted()
    pelt_fast.accelerate(fast, compat="paper")
    pelt_fast.accelerate(other)
    expected = result_of_sample(other, 12)
    with pytest.raises(
        ValueError, match=r"attention_mask is \(2, 7, 7\); expected a tensor \(B, T\)"
    ):
        fast(padded(7)["input_ids"], attention_mask=torch.ones(2, 7, 7))
    torch.testing.assert_close(result_of_sample(other, 12), expected)


def test_what_only_the_library_computes_is_refused():
    fast = adapted()
    pelt_fast.accelerate(fast, compat="paper")
    with pytest.raises(RuntimeError, match="its gating scores are wanted"):
        result_of_sample(fast, 7, output_adapter_gating_scores=True)
    pelt_fast.restore(fast)
    only = adapted(config=adapters.SeqBnConfig(reduction_factor=4, use_gating=True))
    query = only.bert.encoder.layer[1].attention.self.query
    query.compose_single = functools.partial(query.compose_single)  # so that it stays the library's
    pelt_fast.accelerate(only, compat="paper")
    only.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 1]))
    with pytest.raises(ValueError, match="which has no BatchSplit of gated adapters"):
        result_of_sample(only, 7)
    only.add_adapter("c", config=adapters.LoRAConfig(use_gating=True))
    only.set_active_adapters("c")
    with pytest.raises(ValueError, match=r"the gates of 1 layers are the library's.*layer.1.atten"):
        result_of_sample(only, 7)
    only.double()
    del query.compose_single
    pelt_fast.accelerate(only)
    result_of_sample(only, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted("t5"), "T5ForConditionalGeneration has attention between two sequences"),
        (lambda: adapted("gpt2"), r"the gates of 2 layers are the library's"),
        (lambda: adapted().bert.encoder, "has no base model of the adapters library in it"),
    ],
    ids=["t5", "gpt2", "part"],
)
def test_models_without_it(make, message):
    model = make()

    def state():
        return [
            (type(m), list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()
        ]

    before = state()
    with pytest.raises(ValueError, match=message):
        pelt_fast.accelerate(model, compat="paper")
    assert state() == before


def test_arguments(make):
    with pytest.raises(ValueError, match="compat is 'unipelt'; expected 'adapters', 'paper'"):
        pelt_fast.accelerate(adapted(), compat="unipelt")
    with pytest.raises(ValueError, match="model has no layer of the adapters library"):
        pelt_fast.accelerate(make(), compat="paper")
    assert pelt_fast.accelerate(make(), compat="adapters").compat is None
    assert ARCHITECTURES  # the models of conftest.py
