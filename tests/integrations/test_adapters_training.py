"""Accelerated models of the adapters library in the loops and compilers that people run them in."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest

pytest.importorskip("adapters")

import torch
import transformers
from adapters import AdapterTrainer
from torch import Tensor, nn

import pelt_fast

from .adapters_models import HOULSBY, LAYERS, adapted, bottleneck_layers, is_adapter
from .conftest import ARCHITECTURES
from .parity import assert_equal_but_for_rounding, distance

STEPS = 3


def arguments(folder: Path, **options) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
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


def train(model: nn.Module, trainer: type, folder: Path, **options) -> dict[str, Tensor]:
    """Three steps with AdamW: how far each parameter has moved."""
    batches = [ARCHITECTURES["bert"].batch(seed=seed) for seed in range(2 * STEPS)]
    rows = [{key: value[i] for key, value in b.items()} for b in batches for i in range(3)]
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    runner = trainer(model=model, args=arguments(folder, **options), train_dataset=rows)
    loss = torch.tensor(runner.train().training_loss, dtype=torch.float64)
    runner.save_model(folder)
    return {"loss": loss} | {
        n: p.detach() - start[n] for n, p in model.named_parameters() if n in start
    }


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        pytest.param(AdapterTrainer, {}, marks=pytest.mark.slow),
        (transformers.Trainer, {"bf16": True}),
        pytest.param(AdapterTrainer, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        (AdapterTrainer, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01}),
    ],
    ids=["adapter-trainer", "bf16", "checkpointing", "accumulation"],
)
def test_trainers(trainer, options, rounding, fused, tmp_path) -> None:
    plain = adapted("bert")
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    pelt_fast.accelerate(fast)
    precise = {key: value for key, value in options.items() if key != "bf16"}
    right = train(exact, trainer, tmp_path / "exact", **precise)
    theirs = train(plain, trainer, tmp_path / "plain", **options)
    assert not fused
    ours = train(fast, trainer, tmp_path / "fast", **options)
    assert len(fused) >= STEPS * LAYERS["bert"]
    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    # all that moves, as one vector: the error of three steps, each with the roundings of a whole pass
    slack = rounding(dtype, STEPS * LAYERS["bert"])
    assert distance(ours, right) <= 2 * distance(theirs, right) + slack
    saved = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
        for name in ("plain", "fast")
    ]
    assert saved[0] == saved[1]
    assert saved[0]


def test_two_micro_batches_accumulate() -> None:
    plain = adapted("bert").double()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    for model in (plain, fast):
        for seed in range(2):
            model(**ARCHITECTURES["bert"].batch(seed=seed)).loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if is_adapter(name):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-13)


def test_a_retained_graph() -> None:
    fast = adapted("bert")
    pelt_fast.accelerate(fast)
    loss = fast(**ARCHITECTURES["bert"].batch()).loss
    parameters = [p for p in fast.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_double_backward_says_that_there_is_none() -> None:
    layer = bottleneck_layers(adapted("bert"))[-1]
    pelt_fast.accelerate(layer)
    o, x = torch.randn(2, 3, 5, 32).unbind()
    o.requires_grad_()
    y = layer.bottleneck_layer_forward(o, x, layer.LayerNorm)
    (gradient,) = torch.autograd.grad(y.square().sum(), o, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


class Block(nn.Module):
    """The end of a sub-layer alone, as the library's context of a whole model is none that compiles."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        return self.layer.bottleneck_layer_forward(o, x, self.layer.LayerNorm)


def test_a_trace_keeps_to_aten() -> None:
    # a program that is traced must run where pelt_fast is not installed
    layer = bottleneck_layers(adapted("bert"))[-1].eval()
    pelt_fast.accelerate(layer)
    o, x = torch.randn(2, 3, 5, 32).unbind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Block(layer), (o, x))
    assert "pelt_fast::" not in str(traced.graph)
    assert "PythonOp" not in str(traced.graph)
    assert_equal_but_for_rounding(traced(o, x), Block(layer)(o, x))


@pytest.mark.slow
def test_compile_of_a_whole_model(fused) -> None:
    fast = adapted("bert", HOULSBY).double()
    plain = copy.deepcopy(fast)
    pelt_fast.accelerate(fast)
    batch = ARCHITECTURES["bert"].batch()
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager")
    plain(**batch).loss.backward()
    compiled(**batch).loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if is_adapter(name):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-13)
