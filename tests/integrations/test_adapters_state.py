"""What the library's own methods do to a model they do to an accelerated one, whenever they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters import AdapterSetup
from adapters.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from torch import Tensor, nn

import pelt_fast

from .adapters_models import HOULSBY, LAYERS, adapted, bottleneck_layers, plain_model, randomize
from .conftest import ARCHITECTURES

PFEIFFER = adapters.SeqBnConfig(reduction_factor=4)  # on every other layer
MAM = adapters.ParBnConfig(reduction_factor=8, mh_adapter=True)
BATCH = {"input_ids": ARCHITECTURES["bert"].batch()["input_ids"]}

Pair = tuple[nn.Module, nn.Module]


def pair_of(*configs: Any, architecture: str = "bert") -> Pair:
    plain = adapted(architecture, *configs).double().eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    return plain, fast


@pytest.fixture
def pair() -> Pair:
    """A model with the adapters "a" (active), "b" and "c", and it accelerated."""
    return pair_of(HOULSBY, PFEIFFER, MAM)


def change(pair: Pair, function: Callable[[nn.Module], object]) -> None:
    for model in pair:
        function(model)


def compare(pair: Pair, batch: dict[str, Any] = BATCH, **options: Any) -> Tensor:
    """Both compute the same now; returns it."""
    with torch.no_grad():
        expected, actual = (model(**batch, **options)[0] for model in pair)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
    return actual


def test_the_library_still_sees_its_layers(pair, fused) -> None:
    plain, fast = pair
    assert len(bottleneck_layers(plain)) == len(bottleneck_layers(fast)) == LAYERS["bert"]
    assert fast.adapter_summary() == plain.adapter_summary()
    for index, layer in fast.get_adapter("a").items():
        assert layer.keys() == plain.get_adapter("a")[index].keys()
    assert not fused


def test_switching(pair, fused) -> None:
    a = compare(pair)
    assert fused == ["block"] * 4
    change(pair, lambda m: m.set_active_adapters("b"))
    b = compare(pair)
    assert fused == ["block"] * 6, "the layers that lack the adapter are the library's"
    change(pair, lambda m: m.set_active_adapters(None))
    bare = compare(pair)
    assert len(fused) == 6
    change(pair, lambda m: m.set_active_adapters("a"))
    assert torch.equal(compare(pair), a)
    assert not torch.allclose(a, b)
    assert not torch.allclose(b, bare)


def test_contexts_override_the_active_setup(pair, fused) -> None:
    a = compare(pair)
    fused.clear()
    with AdapterSetup("c"):
        c = compare(pair)
        with AdapterSetup(Stack("b", "a")):
            compare(pair)
        assert torch.equal(compare(pair), c)
    assert torch.equal(compare(pair), a)
    assert not torch.allclose(a, c)
    assert fused.count("core") == 4, "two adapters where b has its layers"


def test_an_adapter_added_later_is_served(pair, fused) -> None:
    def add(model: nn.Module) -> None:
        model.add_adapter("late", config=adapters.AdapterPlusConfig(stochastic_depth=0.0))
        randomize(model.double())
        model.set_active_adapters("late")

    change(pair, add)
    compare(pair)
    assert fused == ["block"] * 2


def test_the_first_adapter_may_come_after_accelerate(fused) -> None:
    plain = plain_model("llama").double().eval()
    fast = copy.deepcopy(plain)
    report = pelt_fast.accelerate(fast)
    assert set(report.idle.values()) == {"no adapter is on this layer"}
    compare((plain, fast))
    assert not fused
    change((plain, fast), lambda m: m.add_adapter("a", config="double_seq_bn", set_active=True))
    change((plain.double(), fast.double()), randomize)
    compare((plain, fast))
    assert fused == ["block"] * 4


def test_deleting(pair) -> None:
    change(pair, lambda m: m.set_active_adapters("b"))
    change(pair, lambda m: m.delete_adapter("a"))
    compare(pair)
    assert not any(".adapters.a." in name for name in pair[1].state_dict())
    change(pair, lambda m: m.delete_adapter("b"))
    compare(pair)


def test_averaged_weights(pair) -> None:
    def average(model: nn.Module) -> None:
        model.add_adapter("twin", config=HOULSBY)
        randomize(model.double(), seed=2)
        model.average_adapter("mean", ["a", "twin"], weights=[0.3, 0.7], set_active=True)
        model.double()

    change(pair, average)
    compare(pair)


def test_skipped_layers(pair, fused) -> None:
    whole = compare(pair)
    fused.clear()
    change(pair, lambda m: m.adapters_config.__setattr__("skip_layers", [0]))
    assert not torch.allclose(compare(pair), whole)
    assert fused == ["block"] * 2
    report = pelt_fast.accelerate(pair[1])
    assert list(report.idle.values()) == ["this layer is among skip_layers"] * 2


def test_scaling_and_parameters_are_read_at_call_time(pair) -> None:
    before = compare(pair)

    def triple(model: nn.Module) -> None:
        for layer in bottleneck_layers(model):
            layer.adapters["a"].scaling = 3.0

    change(pair, triple)
    tripled = compare(pair)
    assert not torch.allclose(tripled, before)
    change(pair, lambda m: randomize(m, seed=2))
    assert not torch.allclose(compare(pair), tripled)


# "b" is not on every layer. Not among them, as the library itself fails: a Split or a BatchSplit with
# a child that is not on a layer, a Parallel of parallel adapters.
COMPOSITIONS = [
    Stack("a", "b"),
    Stack("a", "b", "c"),
    Stack("c", "a"),
    Stack("b", "missing"),
    Stack("a", Split("a", "c", splits=[2, 5])),
    Stack("c", Average("a", "c")),
    Split("a", "c", splits=[3, 4]),
    Split("c", "a", "a", splits=[1, 5, 1]),
    BatchSplit("a", "c", batch_sizes=[1, 2]),
    BatchSplit(Split("a", "c", splits=[2, 5]), "a", batch_sizes=[1, 2]),
    Parallel("a", "d"),
    Parallel("d", Stack("a", "d")),
    Average("a", "c", weights=[0.2, 0.8]),
    Average("a", "b"),
    Average(Stack("a", "c"), "a"),
]
FOUR = (HOULSBY, PFEIFFER, MAM, HOULSBY.replace(reduction_factor=2, non_linearity="tanh"))


@pytest.mark.parametrize("setup", COMPOSITIONS, ids=str)
@pytest.mark.parametrize("architecture", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_compositions(setup, architecture, fused) -> None:
    pair = pair_of(*FOUR, architecture=architecture)
    change(pair, lambda m: m.adapters_config.__setattr__("active_setup", setup))
    compare(pair)
    assert fused
    report = pelt_fast.accelerate(pair[1])
    assert report.kinds


@pytest.mark.parametrize("setup", COMPOSITIONS, ids=str)
def test_gradients_of_compositions(setup) -> None:
    pair = pair_of(*FOUR)
    change(pair, lambda m: m.adapters_config.__setattr__("active_setup", setup))
    change(pair, lambda m: m.requires_grad_(True))
    for model in pair:
        model(**BATCH)[0].square().sum().backward()
    plain, fast = (dict(model.named_parameters()) for model in pair)
    for name, parameter in plain.items():
        assert (parameter.grad is None) == (fast[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                fast[name].grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name
            )


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (Fuse("a", "c"), "its adapters' activations are gelu, relu"),
        (Stack(Fuse("a", "c"), "a"), "a Fuse inside Stack: decided at each call"),
        (Fuse(Stack("c", "a"), "c"), "Stack[c, a] is inside the Fuse"),
    ],
    ids=str,
)
def test_a_fusion_of_unlike_adapters_is_the_librarys(setup, reason, fused) -> None:
    pair = pair_of(HOULSBY, PFEIFFER, MAM)
    torch.manual_seed(1)
    change(pair, lambda m: m.add_adapter_fusion(Fuse("a", "c")))
    pair[1].load_state_dict(pair[0].state_dict())
    change(pair, lambda m: m.double().eval().set_active_adapters(setup))
    compare(pair)
    cores = 4 if isinstance(setup, Stack) else 0
    assert fused == ["core"] * cores, "only what follows the fusion"
    report = pelt_fast.accelerate(pair[1])
    assert set(report.waiting.values()) == {reason}
    attentions = [m(**BATCH, output_adapter_fusion_attentions=True) for m in pair]
    expected, actual = (dict(output.adapter_fusion_attentions) for output in attentions)
    assert expected.keys() == actual.keys()
    assert list(actual)


def test_tasks_share_a_batch() -> None:
    pair = pair_of(HOULSBY, HOULSBY)
    change(pair, lambda m: m.adapters_config.__setattr__("active_setup", MultiTask("a", "b")))
    compare(pair, task_ids=torch.tensor([1, 0, 1]))


def test_what_trains_follows_the_library(pair) -> None:
    change(pair, lambda m: m.train_adapter("c"))
    for model in pair:
        model(**BATCH)[0].square().sum().backward()
    plain, fast = (dict(model.named_parameters()) for model in pair)
    names = {name for name, parameter in plain.items() if parameter.grad is not None}
    assert names == {name for name, parameter in fast.items() if parameter.grad is not None}
    assert any(".adapters.c." in name for name in names)
    assert not any(".adapters.a." in name for name in names)


def test_frozen_projections_get_no_gradient(pair) -> None:
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "adapter_down" in name:
                parameter.requires_grad_(False)

    change(pair, freeze)
    for model in pair:
        model(**BATCH)[0].square().sum().backward()
    plain, fast = (dict(model.named_parameters()) for model in pair)
    for name, parameter in plain.items():
        assert (parameter.grad is None) == (fast[name].grad is None), name


def test_gating_scores(fused) -> None:
    pair = pair_of(HOULSBY.replace(use_gating=True), PFEIFFER)
    compare(pair)
    assert fused == ["block"] * 4
    outputs = [model(**BATCH, output_adapter_gating_scores=True) for model in pair]
    assert len(fused) == 4
    expected, actual = (output.adapter_gating_scores["a"] for output in outputs)
    assert expected.keys() == actual.keys() == {0, 1}
    for layer, locations in expected.items():
        for location, scores in locations.items():
            assert (actual[layer][location] == scores).all()
    change(pair, lambda m: m.adapters_config.__setattr__("active_setup", Stack("a", "b")))
    outputs = [model(**BATCH, output_adapter_gating_scores=True) for model in pair]
    assert outputs[0].adapter_gating_scores.keys() == outputs[1].adapter_gating_scores.keys()


def test_heads_and_parallel_inference() -> None:
    import transformers

    torch.manual_seed(0)
    config = ARCHITECTURES["bert"].build().config
    plain = adapters.BertAdapterModel(config)
    for name, labels in {"a": 2, "b": 5}.items():
        plain.add_adapter(name, config="double_seq_bn")
        plain.add_classification_head(name, num_labels=labels)
    assert isinstance(plain, transformers.PreTrainedModel)
    randomize(plain)
    plain.double().eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    pair = (plain, fast)
    change(pair, lambda m: m.set_active_adapters("b"))
    assert compare(pair).shape[-1] == 5
    change(pair, lambda m: m.set_active_adapters(Parallel("a", "b")))
    with torch.no_grad():
        expected, actual = (model(**BATCH) for model in pair)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-11, atol=1e-13)


def test_generation() -> None:
    for architecture in ("llama", "qwen2", "t5"):
        plain, fast = pair_of(HOULSBY, architecture=architecture)
        change((plain, fast), lambda m: m.config.__setattr__("use_cache", True))
        ids = torch.tensor([[5, 6, 7, 8]])
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = plain.generate(input_ids=ids, **options)
        assert torch.equal(fast.generate(input_ids=ids, **options), expected)


def test_bf16_needs_no_cast_any_more() -> None:
    model = adapted("bert", dtype=torch.bfloat16, adapters_fp32=True)
    assert {p.dtype for n, p in model.named_parameters() if ".adapters." in n} == {torch.float32}
    with pytest.raises(RuntimeError, match="dtype"):
        model(**BATCH)
    report = pelt_fast.accelerate(model)
    assert "float32 over bfloat16" in str(report)
    assert model(**BATCH)[0].dtype is torch.bfloat16
    model.adapter_to("a", dtype=torch.bfloat16)
    assert model(**BATCH)[0].dtype is torch.bfloat16
    assert "bfloat16 over bfloat16" in str(pelt_fast.accelerate(model))
    assert pelt_fast.restore(model) == 4
    assert model(**BATCH)[0].dtype is torch.bfloat16
