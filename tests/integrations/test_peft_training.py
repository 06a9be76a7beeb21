"""Accelerated models in the loops and compilers that people run them in."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import pelt_fast

from .parity import distance

STEPS = 3


def train(
    model: nn.Module, folder: Path, batches: list[dict[str, Tensor]], **options
) -> dict[str, Tensor]:
    """Three steps of transformers.Trainer with AdamW: how far each parameter has moved."""
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rows = [{key: value[i] for key, value in b.items()} for b in batches for i in range(3)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # the default divides small gradients by their own rounding errors
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    result = trainer.train()
    moved = {n: p.detach() - start[n] for n, p in model.named_parameters() if n in start}
    return {"loss": torch.tensor(result.training_loss, dtype=torch.float64), **moved}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        pytest.param(
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda options: next(iter(options), "fp32"),
)
def test_trainer(options, make, architectures, rounding, served, tmp_path) -> None:
    arch = architectures["llama"]
    batches = [arch.batch(seed=seed) for seed in range(2 * STEPS)]
    plain = make("llama")
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    pelt_fast.accelerate(fast)
    precise = {key: value for key, value in options.items() if key != "bf16"}
    right = train(exact, tmp_path, batches, **precise)
    theirs = train(plain, tmp_path, batches, **options)
    assert not served
    ours = train(fast, tmp_path, batches, **options)
    assert len(served) >= STEPS * arch.layers
    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    # all that moves, as one vector: the error of three steps, each with the roundings of a whole pass
    assert distance(ours, right) <= 2 * distance(theirs, right) + rounding(
        dtype, STEPS * arch.layers
    )


def test_trainer_saves_and_resumes(make, architectures, accelerated, tmp_path) -> None:
    batches = [architectures["llama"].batch(seed=seed) for seed in range(STEPS)]
    saved = {}
    for name, model in {"plain": make("llama"), "fast": accelerated(make("llama"))}.items():
        train(model, tmp_path / name, batches)
        # without arguments it would make a folder where the tests are started
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        transformers.Trainer(model=model, args=arguments).save_model(tmp_path / name)
        saved[name] = sorted(path.name for path in (tmp_path / name).iterdir())
    assert saved["plain"] == saved["fast"]
    assert "adapter_model.safetensors" in saved["fast"]


def test_two_micro_batches_accumulate(make, architectures, accelerated, assert_same) -> None:
    plain = make("bert")
    fast = accelerated(plain)
    for model in (plain, fast):
        for seed in range(2):
            model(**architectures["bert"].batch(seed=seed)).loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in fast.named_parameters():
        if name in expected:
            assert_same(parameter.grad, expected[name], name)


def test_a_retained_graph(make, architectures, accelerated) -> None:
    fast = accelerated(make("bert"))
    loss = fast(**architectures["bert"].batch()).loss
    parameters = [p for p in fast.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_double_backward_says_that_there_is_none(make, architectures, accelerated) -> None:
    fast = accelerated(make("bert"))
    embeddings = fast.get_input_embeddings()(architectures["bert"].batch()["input_ids"])
    embeddings = embeddings.detach().requires_grad_()
    logits = fast(inputs_embeds=embeddings).logits
    (gradient,) = torch.autograd.grad(logits.sum(), embeddings, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_export_keeps_to_aten(make, architectures, accelerated) -> None:
    # a program that is exported must run where pelt_fast is not installed
    fast = accelerated(make("bert", target_modules=["query"])).eval()
    layer = fast.base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(layer, (x,), strict=False)
        traced = torch.jit.trace(layer, (x,))
    assert not any("pelt_fast" in str(node.target) for node in program.graph.nodes)
    assert "pelt_fast::" not in str(traced.graph)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.slow
def test_compile_of_a_whole_model(make, architectures, accelerated, assert_same) -> None:
    # in fp64, as the compiler takes the rest of the model apart into other operations
    fast = accelerated(make("bert").double())
    plain = copy.deepcopy(fast)
    batch = architectures["bert"].batch()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    plain(**batch).loss.backward()
    compiled(**batch).loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in fast.named_parameters():
        if name in expected:
            assert_same(parameter.grad, expected[name], name)


@pytest.mark.slow
def test_compile_follows_the_state_of_a_layer(make, accelerated, assert_same) -> None:
    model = accelerated(make("bert", lora_dropout=0.5, target_modules=["query"])).eval()
    fast = model.base_model.model.bert.encoder.layer[0].attention.self.query
    plain = copy.deepcopy(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True)

    def check(tokens: int) -> None:
        x = torch.randn(tokens, 32, requires_grad=True)
        dy = torch.randn(tokens, 32)
        results = []
        for layer in (plain, compiled):
            layer.zero_grad()
            y = layer(x)
            results.append([y, *torch.autograd.grad(y, [x, *trained(layer)], dy)])
        for expected, actual in zip(*results, strict=True):
            assert_same(actual, expected)

    def trained(layer: nn.Module) -> list[nn.Parameter]:
        return [p for p in layer.parameters() if p.requires_grad]

    for tokens in (4, 9, 17):
        check(tokens)
    for scale in (2.0, 3.0):
        for layer in (plain, fast):
            layer.set_scale("default", scale)
        check(9)
    with torch.no_grad():
        x = torch.randn(5, 32)
        for layer in (plain, fast):
            layer.merge()
        assert_same(compiled(x), plain(x))
        for layer in (plain, fast):
            layer.unmerge()
        assert_same(compiled(x), plain(x))
        fast.train()
        torch.manual_seed(0)
        first, second = compiled(x), compiled(x)
        torch.manual_seed(0)
        assert torch.equal(compiled(x), first)
        assert not torch.equal(first, second)
