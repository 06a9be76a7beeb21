"""AdapterFusion of the adapters library: outputs, gradients, both stages of training, files, and what is left to it."""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters import (
    AdapterTrainer,
    BatchSplit,
    BnConfig,
    DynamicAdapterFusionConfig,
    Fuse,
    Parallel,
    Stack,
    StaticAdapterFusionConfig,
)
from torch import Tensor, nn

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.integrations import adapters_bottleneck as integration
from pelt_fast.random import new_seed, philox_mask

from .adapters_models import LAYERS, bottleneck_layers, is_adapter, plain_model, randomize
from .conftest import ARCHITECTURES
from .parity import (
    AUTOCAST,
    BF16,
    FP32,
    Precision,
    Results,
    assert_as_accurate,
    one_step,
    three_steps,
)
from .test_adapters_parity import assert_same_in_fp64
from .test_adapters_training import train

PFEIFFER = adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu")
FUSE = Fuse("a", "b", "c")
SITES = {"bert": 2, "t5": 4, "gpt2": 2, "qwen2": 2}  # one in each block


def is_fusion(name: str) -> bool:
    return ".adapter_fusion_layer." in name


def with_fusion(
    architecture: str = "bert",
    *configs: Any,
    fusion: Any = "dynamic",
    dtype: torch.dtype = torch.float32,
    setup: Fuse = FUSE,
    train_fusion: bool = True,
) -> nn.Module:
    """Adapters "a", "b", "c" and their fusion, all of it drawn at random, the fusion in training."""
    model = plain_model(architecture, dtype)
    for i, name in enumerate(("a", "b", "c")):
        model.add_adapter(name, config=configs[i % len(configs)] if configs else PFEIFFER)
    model.add_adapter_fusion(setup, fusion)
    randomize(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_fusion(name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.5 * noise / math.sqrt(parameter.shape[-1]))
                if name.endswith("value.weight"):
                    parameter.add_(torch.eye(len(parameter)))
    model.to(dtype)
    if train_fusion:
        model.train_adapter_fusion(setup)
        model.get_input_embeddings().weight.requires_grad_(True)  # a gradient through every layer
    else:
        model.set_active_adapters(setup)
    return model


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The fusions that accelerated layers have served themselves so far: whether with what comes after."""
    calls: list[bool] = []
    original = integration.fusion_block

    def spy(*args: Any, after: bool = True, **kwargs: Any) -> Any:
        calls.append(after)
        return original(*args, after=after, **kwargs)

    monkeypatch.setattr(integration, "fusion_block", spy)
    return calls


def models(name: str, precision: Precision, **options: Any) -> tuple[nn.Module, ...]:
    plain = with_fusion(name, dtype=precision.weights, **options)
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    return plain, fast, copy.deepcopy(plain).double()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("bert", FP32),
        ("bert", BF16),
        ("bert", AUTOCAST),
        ("t5", FP32),
        ("qwen2", FP32),
        pytest.param("qwen2", BF16, marks=pytest.mark.slow),
        pytest.param("gpt2", FP32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_outputs_and_every_gradient(name: str, precision: Precision, fusions) -> None:
    batch = ARCHITECTURES[name].batch()
    plain, fast, exact = models(name, precision)
    exact = one_step(exact, batch)
    with precision():
        theirs = one_step(plain, batch)
        assert not fusions
        ours = one_step(fast, batch)
    assert fusions == [True] * SITES[name]
    assert sum(map(is_fusion, ours)) == 5 * SITES[name]
    # what all keys have in common moves no score: its gradient is rounding, ours and theirs
    for results in (ours, theirs, exact):
        for key in [key for key in results if key.endswith("key.bias")]:
            noise = results.pop(key).abs().max()
            assert noise <= 1e-3 * max(value.abs().max() for value in results.values())
    assert_as_accurate(ours, theirs, exact, precision.computed, 4 * SITES[name])


FUSION_FLAGS = [
    StaticAdapterFusionConfig(),
    DynamicAdapterFusionConfig(value_before_softmax=False),
    DynamicAdapterFusionConfig(query_before_ln=True),
    DynamicAdapterFusionConfig(residual_before=True),
    StaticAdapterFusionConfig(residual_before=True, query_before_ln=True),
    DynamicAdapterFusionConfig(temperature=True),
    DynamicAdapterFusionConfig(query=False),
    DynamicAdapterFusionConfig(key=False),
    DynamicAdapterFusionConfig(query=False, key=False, value=False),
]
ADAPTER_FLAGS = [
    {"original_ln_before": True, "residual_before_ln": True},
    {"residual_before_ln": False, "original_ln_before": True},
    {"residual_before_ln": "post_add", "original_ln_before": True},
    {"original_ln_after": False},
    {"original_ln_before": False, "original_ln_after": False, "residual_before_ln": False},
    {"is_parallel": True, "scaling": 4.0},
    {"scaling": "learned"},
    {"scaling": "channel", "mh_adapter": True},
    {"use_gating": True},
    {"ln_after": True, "dropout": 0.5},
]


@pytest.mark.parametrize("fusion", FUSION_FLAGS)
def test_every_flag_of_the_fusion(fusion: Any, fusions) -> None:
    model = with_fusion(fusion=fusion)
    fast = assert_same_in_fp64(model, ARCHITECTURES["bert"].batch())
    assert len(fusions) == 2
    ours, theirs = (
        [m.T for m in side.modules() if type(m).__name__ == "BertFusion"] for side in (fast, model)
    )
    assert ours == theirs


@pytest.mark.parametrize("flags", ADAPTER_FLAGS, ids=str)
def test_every_flag_of_the_adapters(flags: dict[str, Any], fusions) -> None:
    fields = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 4}
    config = BnConfig(**{**fields, "non_linearity": "gelu", **flags})
    model = with_fusion("bert", config)
    assert_same_in_fp64(model, ARCHITECTURES["bert"].batch())
    assert len(fusions) == sum(len(layer.adapters) > 0 for layer in bottleneck_layers(model))


def test_widths_may_differ(fusions) -> None:
    configs = [PFEIFFER.replace(reduction_factor=factor) for factor in (2, 4, 16)]
    assert_same_in_fp64(with_fusion("bert", *configs), ARCHITECTURES["bert"].batch())
    assert len(fusions) == 2


def test_adapters_in_training_beside_the_fusion(fusions) -> None:
    model = with_fusion()
    model.train_adapter_fusion(FUSE, unfreeze_adapters=True)
    assert any(p.requires_grad for n, p in model.named_parameters() if is_adapter(n))
    assert_same_in_fp64(model, ARCHITECTURES["bert"].batch())
    assert len(fusions) == 2


def test_inside_a_stack_and_beside_what_is_not_there(fusions) -> None:
    model = with_fusion()
    model.add_adapter("lang", config=PFEIFFER)
    model.set_active_adapters(Stack("lang", FUSE))
    assert_same_in_fp64(model, ARCHITECTURES["bert"].batch())
    assert fusions == [False] * 2


def test_alone_in_a_stack_it_is_one_call(fusions) -> None:
    model = with_fusion()
    model.set_active_adapters(Stack(FUSE))
    assert_same_in_fp64(model, ARCHITECTURES["bert"].batch())
    assert fusions == [True] * 2


def test_what_is_left_to_the_library(fusions) -> None:
    batch = ARCHITECTURES["bert"].batch()
    for configs in (
        [PFEIFFER, PFEIFFER.replace(non_linearity="tanh")],
        [PFEIFFER.replace(ln_before=True)],
        [PFEIFFER.replace(phm_layer=True, phm_dim=2)],
    ):
        model = with_fusion("bert", *configs)
        assert_same_in_fp64(model, batch)
        report = pelt_fast.accelerate(model)
        assert len(report.waiting) >= 2
        pelt_fast.restore(model)
    hooked = with_fusion()
    for module in hooked.modules():
        if type(module).__name__ == "BertFusion":
            module.query.register_forward_hook(lambda *_: None)
    assert_same_in_fp64(hooked, batch)
    assert not fusions


def test_attentions_that_are_asked_for(fusions) -> None:
    plain, fast, _ = models("bert", FP32)
    batch = ARCHITECTURES["bert"].batch()
    found = []
    for model in (plain.eval(), fast.eval()):
        output = model(**batch, output_adapter_fusion_attentions=True)
        found.append(output.adapter_fusion_attentions)
    theirs, ours = found
    assert len(fusions) == 2
    assert ours.keys() == theirs.keys() == {"a,b,c"}
    for layer, sites in theirs["a,b,c"].items():
        for site, expected in sites.items():
            actual = ours["a,b,c"][layer][site]
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected))


def test_dropout_on_scores_is_exact_in_distribution(fusions) -> None:
    """With the mask that a call draws, the library computes what we compute."""
    model = with_fusion(fusion=DynamicAdapterFusionConfig(dropout_prob=0.5)).double()
    fast = copy.deepcopy(model)
    pelt_fast.accelerate(fast)
    batch = ARCHITECTURES["bert"].batch()
    torch.manual_seed(3)
    masks = [philox_mask(new_seed(torch.device("cpu")), (21, 3), 0.5) for _ in range(2)]
    assert 0 < sum(mask.sum() for mask in masks) < 2 * 63
    for module in model.modules():
        if type(module).__name__ == "BertFusion":
            module.dropout = _Given(masks)
    expected = one_step(model, batch)
    torch.manual_seed(3)
    actual = one_step(fast, batch)
    assert len(fusions) == 2
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= 1e-10 * (1 + value.norm()), key
    assert any(key.endswith("key.bias") and value.norm() > 1e-6 for key, value in actual.items())


class _Given(nn.Module):
    """Dropout with the masks of a list, one after the other."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks.pop(0).view(x.shape) / 0.5


@pytest.mark.parametrize("name", ["bert", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_both_stages_of_training(name: str, tmp_path: Path, fusions) -> None:
    """Each adapter alone, then the fusion with everything else frozen; saved, loaded and trained on."""
    batches = [ARCHITECTURES[name].batch(seed=seed) for seed in range(3)]
    fast = with_fusion(name, train_fusion=False)
    plain, exact = copy.deepcopy(fast), copy.deepcopy(fast).double()
    pelt_fast.accelerate(fast)
    sides = (fast, plain, exact)
    for stage in ("a", "b", "c", FUSE):
        for model in sides:
            if isinstance(stage, Fuse):
                model.train_adapter_fusion(stage)
                for key, parameter in model.named_parameters():
                    assert not (is_adapter(key) and parameter.requires_grad)
            else:
                model.train_adapter(stage)
        ours, theirs, right = (
            {k: v for k, v in three_steps(model, batches).items() if not k.endswith("key.bias")}
            for model in sides
        )
        assert_as_accurate(ours, theirs, right, torch.float32, 3 * LAYERS[name])
    assert len(fusions) == 3 * SITES[name]
    fast.save_adapter_fusion(str(tmp_path / "fusion"), FUSE)
    for adapter in FUSE.children:
        fast.save_adapter(str(tmp_path / adapter), adapter)
    fresh = plain_model(name)
    for adapter in FUSE.children:
        fresh.load_adapter(str(tmp_path / adapter))
    fresh.load_adapter_fusion(str(tmp_path / "fusion"), set_active=True)
    fresh.load_state_dict(fast.state_dict(), strict=True)
    with torch.no_grad():
        expected = fresh.eval()(**batches[0]).logits
        actual = fast.eval()(**batches[0]).logits
    torch.testing.assert_close(actual, expected)


def test_trainer_with_regularisation(tmp_path: Path) -> None:
    """The library's own trainer adds the loss of the value matrices, which it reads from the modules."""
    plain, fast, exact = models("bert", FP32)
    results: list[Results] = []
    for side, model in (("fast", fast), ("plain", plain), ("exact", exact)):
        model.get_input_embeddings().weight.requires_grad_(False)
        moved = train(model, AdapterTrainer, tmp_path / side)
        results.append({k: v for k, v in moved.items() if not k.endswith("key.bias")})
    values = [k for k in results[0] if k.endswith("value.weight")]
    assert values
    assert all(results[0][k].abs().max() > 0 for k in values)
    assert_as_accurate(*results, torch.float32, 3 * LAYERS["bert"])


def test_state_of_the_setup_is_read_at_each_call(fusions) -> None:
    plain, fast, _ = models("bert", FP32)
    batch = ARCHITECTURES["bert"].batch()
    del batch["labels"]

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(fast.eval()(**batch).logits, plain.eval()(**batch).logits)

    same()
    for change in (
        lambda m: m.set_active_adapters("b"),
        lambda m: m.set_active_adapters(FUSE),
        lambda m: m.add_adapter_fusion(["c", "a"], "static", set_active=True),
        lambda m: m.delete_adapter_fusion(["c", "a"]) or m.set_active_adapters(FUSE),
        lambda m: m.set_active_adapters(Parallel("a", "b")),
        lambda m: m.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 2])),
        lambda m: m.set_active_adapters(FUSE, skip_layers=[0]),
        lambda m: m.set_active_adapters(FUSE),
    ):
        for model in (plain, fast):
            torch.manual_seed(5)
            change(model)
        same()
    pelt_fast.restore(fast)
    same()
    assert len(fusions) == 2 * 5 + 1


def test_folded_matrices_follow_every_change_of_the_weights() -> None:
    """In place, through ``.data``, through memory shared with NumPy, by a step, by loading, by a new tensor."""
    fast = with_fusion().eval()
    plain = copy.deepcopy(fast)
    pelt_fast.accelerate(fast)
    batch = ARCHITECTURES["bert"].batch(rows=2, tokens=6)
    parts = ["query.weight", "value.weight", "key.bias", "adapters.b.adapter_up.weight"]
    parts += ["adapters.a.adapter_down.0.weight", "adapters.c.adapter_up.bias"]

    def of(model: nn.Module, part: str) -> nn.Parameter:
        return next(p for n, p in model.named_parameters() if n.endswith(part))

    def same() -> Tensor:
        with torch.no_grad():
            ours, theirs = fast(**batch).logits, plain(**batch).logits
            torch.testing.assert_close(ours, theirs)
        return ours

    before = same()
    changes = (
        lambda p: p.mul_(1.5),
        lambda p: p.data.mul_(0.5),
        lambda p: p.detach().numpy().__imul__(1.25),
        lambda p: setattr(p, "data", p.data * 2),
        lambda p: p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1))),
    )
    for part in parts:
        for change in changes:
            with torch.no_grad():
                change(of(fast, part))
                change(of(plain, part))
            after = same()
            if part != "key.bias":
                assert not torch.equal(before, after), part
            before = after
    fast.load_state_dict({k: v * 0.9 for k, v in fast.state_dict().items()})
    plain.load_state_dict(fast.state_dict())
    same()


def test_folded_matrices_go_with_the_model() -> None:
    PF.clear_folded()
    model = with_fusion().eval()
    pelt_fast.accelerate(model)
    with torch.no_grad():
        model(**ARCHITECTURES["bert"].batch())
    kept = PF.folded_bytes()
    with torch.no_grad():
        model(**ARCHITECTURES["bert"].batch())
    assert PF.folded_bytes() == kept
    del model
    gc.collect()
    assert PF.folded_bytes() == 0
