"""What stands around the adapters in a model of the library: attention, linear layers without LoRA, active setups."""

import copy
import pickle

import adapters
import pytest
import torch
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Stack
from adapters.context import AdapterSetup
from adapters.methods.adapter_layer_base import AdapterLayerBase
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pelt_fast
from pelt_fast.integrations.adapters_class import FastLayer

from .adapters_models import plain_model, randomize
from .conftest import ARCHITECTURES

LIBRARY_MODELS = ["bert", "roberta", "t5", "llama"]


class Repeats(TorchDispatchMode):
    """Counts tensors that are repeated, each a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.repeat.default
        return func(*args, **(kwargs or {}))


def with_loras(architecture: str = "bert", dtype: torch.dtype = torch.float64) -> nn.Module:
    model = plain_model(architecture, dtype)
    for name in "ab":
        model.add_adapter(name, config=adapters.LoRAConfig(r=4, init_weights="bert"))
    model.add_adapter("c", config="seq_bn")
    model.to(dtype)
    model.set_active_adapters("a")
    randomize(model)
    return model.eval()


def run(model: nn.Module, architecture: str = "bert") -> torch.Tensor:
    batch = ARCHITECTURES[architecture].batch(seed=0)
    if architecture != "t5":
        del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("architecture", LIBRARY_MODELS)
def test_attention_copies_nothing(architecture) -> None:
    model = with_loras(architecture)
    counts, logits = [], []
    for _ in range(2):
        with Repeats() as repeats:
            logits.append(run(model, architecture))
        counts.append(repeats.count)
        pelt_fast.accelerate(model)
    assert counts[0] - counts[1] >= 3 * model.config.num_hidden_layers
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_parallel_still_repeats_what_has_too_few(architecture) -> None:
    """LoRA alone in ``Parallel``: queries and values of twice as many samples as keys."""
    model = with_loras(architecture)
    model.set_active_adapters(Parallel("a", "b"))
    expected = run(model, architecture)
    pelt_fast.accelerate(model)
    torch.testing.assert_close(run(model, architecture), expected, rtol=1e-9, atol=1e-9)


def test_attention_is_copied_and_restored() -> None:
    model = with_loras()
    expected = run(model)
    before = {name: type(module) for name, module in model.named_modules()}
    pelt_fast.accelerate(model)
    attention = model.bert.encoder.layer[0].attention.self
    assert type(attention) is not before["bert.encoder.layer.0.attention.self"]
    torch.testing.assert_close(run(copy.deepcopy(model)), expected, rtol=1e-9, atol=1e-9)
    pelt_fast.restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(run(model), expected)


def test_attention_is_pickled() -> None:
    """Of a model without LoRA, which the library's own lambdas keep from being pickled."""
    model = plain_model()
    model.add_adapter("c", config="seq_bn")
    model.eval()
    pelt_fast.accelerate(model)
    attention = model.bert.encoder.layer[0].attention.self
    twin = pickle.loads(pickle.dumps(attention))
    assert type(twin) is type(attention)
    x = torch.randn(2, 5, 32)
    with torch.no_grad(), Repeats() as repeats:
        assert torch.equal(twin(x)[0], attention(x)[0])
    assert repeats.count == 0


def test_a_forward_of_somebody_elses_is_left() -> None:
    model = with_loras()
    first, second = (model.bert.encoder.layer[i].attention.self for i in range(2))

    class Other(type(first)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    first.__class__ = Other
    second.forward = second.forward
    pelt_fast.accelerate(model)
    assert type(first) is Other
    assert type(second).__module__.startswith("adapters.")


def test_linear_layers_without_lora_are_packed_and_not_reported() -> None:
    model = with_loras(dtype=torch.float32)
    expected = run(model)
    report = pelt_fast.accelerate(model)
    linear = [m for m in model.bert.modules() if isinstance(m, nn.Linear) and hasattr(m, "loras")]
    empty = [m for m in linear if not m.loras]
    assert len(empty) == 3 * model.config.num_hidden_layers
    assert all(isinstance(m, FastLayer) for m in linear)
    assert len([name for name in report.replaced if name.endswith(("query", "value"))]) == 2 * (
        model.config.num_hidden_layers
    )
    assert not any(name.endswith(("key", "dense")) for name in report.replaced)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    # and one that gets a LoRA later is served at once
    model.add_adapter(
        "all", config=adapters.LoRAConfig(r=4, output_lora=True, intermediate_lora=True)
    )
    model.set_active_adapters("all")
    randomize(model, seed=2)
    ours = run(model)
    pelt_fast.restore(model)
    torch.testing.assert_close(ours, run(model), rtol=1e-4, atol=1e-4)


SETUPS = [
    None,
    "a",
    "c",
    "unknown",
    Stack("a", "c"),
    Stack("unknown", Parallel("b", "c")),
    Parallel("a", Stack("b", "c")),
    BatchSplit("unknown", "b", batch_sizes=[1, 1]),
    Average("a", "b"),
    Fuse("c", "unknown"),
]


@pytest.mark.parametrize("skip", [None, [1], [0, 1]], ids=str)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_the_active_setup_is_the_librarys(setup, skip) -> None:
    model = with_loras()
    pelt_fast.accelerate(model)
    layers = [m for m in model.modules() if isinstance(m, FastLayer)]
    assert {m.adapter_modules_name for m in layers} == {"loras", "adapters", "prefixes"}
    model.adapters_config.skip_layers = skip
    found = []
    with AdapterSetup(setup):
        for layer in layers:
            expected = AdapterLayerBase.get_active_setup(layer)
            assert layer.get_active_setup() is expected
            found.append(expected is not None)
    if setup in ("a", "c") and skip is None:
        assert any(found)
        assert not all(found)


def test_half_precision_trains_as_accurately() -> None:
    """Frozen products of bfloat16 run packed, forward and backward."""
    model = with_loras(dtype=torch.bfloat16)
    model.train_adapter("a")
    batch = ARCHITECTURES["bert"].batch(seed=0)
    exact = copy.deepcopy(model).double()
    grads = []
    for m in (model, exact):
        m.eval()(**batch).loss.backward()
        grads.append({n: p.grad.double() for n, p in m.named_parameters() if p.grad is not None})
    model.zero_grad()
    pelt_fast.accelerate(model)
    model(**batch).loss.backward()
    ours = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    theirs, true = grads
    assert ours.keys() == true.keys()

    def apart(grads):
        distances = [(grads[n] - true[n]).norm() / true[n].norm() for n in true]
        return torch.stack(distances).median()

    assert apart(ours) <= 2 * apart(theirs)


@pytest.mark.filterwarnings("ignore:`output_attentions=True`:UserWarning")
def test_restored_after_outputs_were_recorded() -> None:
    """Transformers then leaves a bound method on each recorded layer; with the plain library it is the library's."""
    model = with_loras("llama")
    pelt_fast.accelerate(model)
    batch = ARCHITECTURES["llama"].batch(seed=0)
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).logits
    left = [m for m in model.modules() if "forward" in vars(m)]
    assert left
    pelt_fast.restore(model)
    for module in left:
        kept = vars(module).get("forward")
        assert kept is None or kept.__func__ is type(module).forward
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)
