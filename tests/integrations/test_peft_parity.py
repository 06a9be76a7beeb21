"""An accelerated model computes what PEFT computes, as accurately: outputs, gradients, steps.

Judge is the same PEFT model in fp64. Per tensor, for the norm of the error and its largest element,
both relative to those of the tensor:

    our error <= 2 · PEFT's error + u · √(3L) + a · √(LK)

where PEFT's error is the one in that tensor or the median of those in all tensors, whichever is
larger: in one tensor of a hundred PEFT is lucky, and luck is no yardstick. The rest is `rounding` in
conftest.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

ARCHITECTURES = ["bert", "roberta", "t5", "gpt2", "llama"]

Results = dict[str, Tensor]
Accelerated = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Precision:
    """Dtype of the base weights, of the adapters, and whether autocast is on."""

    name: str
    weights: torch.dtype
    adapters_fp32: bool = True
    autocast: bool = False

    @property
    def computed(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.weights

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            yield


FP32 = Precision("fp32", torch.float32)
BF16 = Precision("bf16", torch.bfloat16)
AUTOCAST = Precision("autocast", torch.float32, autocast=True)
PRECISIONS = [
    FP32,
    BF16,
    Precision("bf16-adapters-too", torch.bfloat16, adapters_fp32=False),
    AUTOCAST,
    Precision("autocast-bf16-base", torch.bfloat16, autocast=True),
]


def gradients(model: nn.Module) -> Results:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(model: nn.Module, batch: dict[str, Tensor]) -> Results:
    """Loss, logits, and the gradient of everything that trains."""
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients(model)}


def three_steps(model: nn.Module, batches: list[dict[str, Tensor]]) -> Results:
    """The loss of each step, and how far each parameter has moved."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    results = {}
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        results[f"loss.{index}"] = loss.detach()
    results.update({name: p.detach() - start[name] for name, p in trained.items()})
    return results


@pytest.fixture
def assert_as_accurate(rounding: Callable[[torch.dtype, int], float]) -> Callable[..., None]:
    """assert_as_accurate(ours, theirs, exact, dtype, layers)"""
    return functools.partial(_assert_as_accurate, rounding)


def _assert_as_accurate(
    rounding: Callable[[torch.dtype, int], float],
    ours: Results,
    theirs: Results,
    exact: Results,
    dtype: torch.dtype,
    layers: int,
) -> None:
    assert ours.keys() == theirs.keys() == exact.keys()
    slack = rounding(dtype, layers)
    wrong = []
    for measure in (torch.linalg.vector_norm, _largest):
        peers = {name: relative_error(theirs[name], exact[name], measure) for name in exact}
        typical = statistics.median(peers.values())
        for name in exact:
            assert ours[name].dtype is theirs[name].dtype, name
            error = relative_error(ours[name], exact[name], measure)
            allowed = 2 * max(peers[name], typical) + slack
            if not error <= allowed:
                wrong.append(f"{name}: {error:.3g}, allowed {allowed:.3g}")
    assert not wrong, "\n".join(wrong)


def relative_error(actual: Tensor, exact: Tensor, measure: Callable[[Tensor], Tensor]) -> float:
    assert actual.shape == exact.shape
    exact = exact.double()
    size = measure(exact).item()
    error = measure(actual.double() - exact).item()
    return error / size if size else error


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_every_gradient(
    name: str,
    precision: Precision,
    make,
    architectures,
    accelerated: Accelerated,
    served,
    assert_as_accurate,
) -> None:
    arch = architectures[name]
    plain = make(name, precision.weights, precision.adapters_fp32)
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    with precision():
        theirs = one_step(plain, arch.batch())
        ours = one_step(fast, arch.batch())
    assert len(served) == arch.layers
    assert sum(".lora_" in key for key in ours) == 2 * arch.layers
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


@pytest.mark.parametrize("precision", [FP32, BF16, AUTOCAST], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_three_optimizer_steps(
    name: str,
    precision: Precision,
    make,
    architectures,
    accelerated: Accelerated,
    assert_as_accurate,
) -> None:
    arch = architectures[name]
    plain = make(name, precision.weights, precision.adapters_fp32)
    fast = accelerated(plain)
    batches = [arch.batch(seed=seed) for seed in range(3)]
    exact = three_steps(copy.deepcopy(plain).double(), batches)
    with precision():
        theirs = three_steps(plain, batches)
        ours = three_steps(fast, batches)
    # each of the three steps brings in the roundings of a whole pass
    assert_as_accurate(ours, theirs, exact, precision.computed, 3 * arch.layers)


@pytest.mark.parametrize(
    "options",
    [
        # the softmax ignores a key's bias: its gradient is all cancellation, and no bound holds
        {"bias": "lora_only", "target_modules": ["query", "value", "dense"]},
        {"lora_bias": True, "target_modules": ["query", "intermediate.dense"]},
        {"use_rslora": True},
        {"r": 1},
        {"r": 3, "rank_pattern": {"query": 16, "value": 33}, "alpha_pattern": {"key": 1}},
        {"modules_to_save": ["classifier"]},
        {"target_modules": ["query"], "layers_to_transform": [1]},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_configurations(
    options,
    precision: Precision,
    make,
    architectures,
    accelerated: Accelerated,
    served,
    assert_as_accurate,
) -> None:
    arch = architectures["bert"]
    plain = make("bert", precision.weights, **options)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_B." in name and name.endswith("bias"):
                parameter.uniform_(-1, 1)
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    theirs, ours = one_step(plain, arch.batch()), one_step(fast, arch.batch())
    assert served
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_two_active_adapters_are_summed(
    precision: Precision,
    make,
    randomize,
    architectures,
    accelerated: Accelerated,
    served,
    assert_as_accurate,
) -> None:
    import peft

    arch = architectures["llama"]
    plain = make("llama", precision.weights)
    second = peft.LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    plain.add_adapter("second", second)
    randomize(plain)
    plain.base_model.set_adapter(["default", "second"])
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    theirs, ours = one_step(plain, arch.batch()), one_step(fast, arch.batch())
    assert len(served) == arch.layers
    assert sum(".second." in key for key in ours) == 2 * 4
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing_changes_nothing(
    name: str,
    use_reentrant: bool,
    dropout: float,
    make,
    architectures,
    accelerated,
    served,
    assert_same,
) -> None:
    arch = architectures[name]
    fast = accelerated(make(name, lora_dropout=dropout)).train()
    torch.manual_seed(3)
    direct = one_step(fast, arch.batch())
    calls = len(served)
    fast.enable_input_require_grads()  # a reentrant checkpoint wants an input with a gradient
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    recomputed = one_step(fast, arch.batch())
    assert len(served) - calls > calls, "nothing was recomputed"
    assert direct.keys() == recomputed.keys()
    for key, value in direct.items():
        assert_same(recomputed[key], value, key, arch.layers)


def test_checkpointing_under_autocast(
    make, architectures, accelerated: Accelerated, assert_as_accurate
) -> None:
    arch, precision = architectures["bert"], AUTOCAST
    plain = make("bert")
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    for model in (plain, fast):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with precision():
        theirs, ours = one_step(plain, arch.batch()), one_step(fast, arch.batch())
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


def test_dropout_acts_in_training_alone(
    make, architectures, accelerated: Accelerated, assert_same
) -> None:
    batch = architectures["bert"].batch()
    plain = make("bert", lora_dropout=0.5)
    fast = accelerated(plain)
    with torch.no_grad():
        for model in (plain, fast):
            model.eval()
        logits, expected = fast(**batch).logits, plain(**batch).logits
        assert_same(logits, expected)
        fast.train()
        torch.manual_seed(0)
        first, second = fast(**batch).logits, fast(**batch).logits
        torch.manual_seed(0)
        again = fast(**batch).logits
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_dropout_of_probability_one_leaves_the_base(
    make, architectures, accelerated, assert_same
) -> None:
    batch = architectures["bert"].batch()
    fast = accelerated(make("bert", lora_dropout=1.0)).train()
    with torch.no_grad():
        dropped = fast(**batch).logits
        with fast.disable_adapter():
            base = fast(**batch).logits
    assert_same(dropped, base)


def test_mean_over_dropout_masks_is_peft_without_dropout(make, accelerated: Accelerated) -> None:
    # one layer is linear in the mask, so its outputs average to those without dropout
    fast = accelerated(make("bert", lora_dropout=0.5)).train()
    layer = fast.base_model.model.bert.encoder.layer[0].attention.self.query
    x, draws = torch.randn(1, 32), 4000
    with torch.no_grad():
        torch.manual_seed(0)
        samples = layer(x.expand(draws, 32))
        expected = layer.eval()(x)[0]
    deviation = samples.std(0) / math.sqrt(draws)
    # 32 numbers, each within five standard deviations of its mean
    assert ((samples.mean(0) - expected).abs() <= 5 * deviation).all()
