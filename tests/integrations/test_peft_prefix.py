"""PEFT's prefix tuning: the same step with its MLP run once; what else PEFT puts in front of a sequence is left."""

import copy

import peft
import pytest
import torch

import pelt_fast

from .conftest import ARCHITECTURES


def adapted(architecture="bert", kind=peft.PrefixTuningConfig, **options):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture].build().double()
    task = "SEQ_CLS" if architecture == "bert" else "CAUSAL_LM"
    if kind is peft.PrefixTuningConfig:
        options = {"prefix_projection": True, "encoder_hidden_size": 12, **options}
    config = kind(task_type=task, num_virtual_tokens=3, **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_a_step(architecture, monkeypatch):
    # Llama's config has one head of keys for two of queries
    options = {"num_attention_heads": 1, "token_dim": 16} if architecture == "llama" else {}
    model = adapted(architecture, **options)
    fast = copy.deepcopy(model)
    report = pelt_fast.accelerate(fast)
    assert report.replaced == ["prompt_encoder.default"]
    assert not set(report.left) - {"base_model.classifier"}
    assert "once for all samples" in str(report)
    seen = []
    sequential = torch.nn.Sequential.forward
    monkeypatch.setattr(
        torch.nn.Sequential, "forward", lambda self, x: seen.append(len(x)) or sequential(self, x)
    )
    batch = ARCHITECTURES[architecture].batch()
    ours, theirs = step(fast, batch), step(model, batch)
    assert seen == [1, len(batch["input_ids"])]
    assert any("prompt_encoder" in name for name in ours)
    torch.testing.assert_close(ours, theirs)


def test_generation_and_files(tmp_path):
    model = adapted("gpt2").eval()
    fast = copy.deepcopy(model)
    pelt_fast.accelerate(fast)
    prompt = ARCHITECTURES["gpt2"].batch()["input_ids"][:, :4]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        tokens = [m.generate(input_ids=prompt, num_beams=beams, **options) for m in (fast, model)]
        assert torch.equal(*tokens)
    fast.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ARCHITECTURES["gpt2"].build().double(), tmp_path)
    report = pelt_fast.accelerate(again)
    assert report.left == {
        "prompt_encoder.default": "its prefix is flat: there is no network to run"
    }
    assert pelt_fast.restore(fast) == 1
    assert type(fast.prompt_encoder["default"]) is type(model.prompt_encoder["default"])


def test_whoever_looks_sees_all_rows():
    fast = adapted()
    pelt_fast.accelerate(fast)
    seen = []
    fast.prompt_encoder["default"].transform[0].register_forward_hook(
        lambda module, args, output: seen.append(len(output))
    )
    batch = ARCHITECTURES["bert"].batch()
    fast(**batch)
    assert seen == [len(batch["input_ids"])]
    assert "has hooks" in str(pelt_fast.accelerate(fast).waiting)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (peft.PrefixTuningConfig, {"prefix_projection": False}, "its prefix is flat"),
        (peft.PromptTuningConfig, {}, "it is a PromptEmbedding, which PEFT runs once"),
        (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}, "it is a PromptEncoder, which"),
    ],
    ids=["flat", "prompt", "p-tuning"],
)
def test_what_is_left(kind, options, reason):
    model = adapted(kind=kind, **options)
    report = pelt_fast.accelerate(model)
    assert set(report.left) == {"base_model.classifier", "prompt_encoder.default"}
    assert report.left["prompt_encoder.default"].startswith(reason)
    assert not report.replaced
    assert pelt_fast.restore(model) == 0
