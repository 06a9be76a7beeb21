"""Compacter and Compacter++ in models of the adapters library, accelerated: results, training, files."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters.composition import BatchSplit, Stack
from torch import Tensor, nn

import pelt_fast
from pelt_fast import functional
from pelt_fast.checkpoints import save_adapter
from pelt_fast.integrations import adapters_weights

from .adapters_models import HOULSBY, LAYERS, adapted, plain_model, randomize
from .conftest import ARCHITECTURES
from .parity import (
    AUTOCAST,
    BF16,
    FP32,
    Precision,
    assert_as_accurate,
    assert_as_accurate_in_the_middle,
    one_step,
    three_steps,
)

# a bottleneck of 16 of the 32 features: a smaller one takes fewer products as dense matrices
COMPACTER = adapters.CompacterConfig(reduction_factor=2, cross_adapter=True)
BATCH = ARCHITECTURES["bert"].batch()
FORMS: dict[str, dict[str, Any]] = {
    "shared": {},
    "own": {"shared_phm_rule": False},
    "factorized_rule": {"factorized_phm_rule": True},
    "own_factorized_rule": {"factorized_phm_rule": True, "shared_phm_rule": False},
    "not_factorized": {"factorized_phm_W": False},
    "shared_weights": {"shared_W_phm": True},
    "rank_2": {"phm_rank": 2},
    "n_2": {"phm_dim": 2},
    "no_bias_fixed_rule": {"phm_bias": False, "learn_phm": False},
    "gated": {"use_gating": True, "scaling": "channel", "ln_before": True, "ln_after": True},
    "parallel": {"is_parallel": True},
}


@pytest.fixture
def kronecker(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of ``functional.compacter`` that built no dense matrix."""
    calls: list[str] = []
    module = sys.modules["pelt_fast.functional.compacter"]

    def spy(original: Any, count: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count()
            return original(*args, **kwargs)

        return counted

    monkeypatch.setattr(
        functional, "compacter", spy(functional.compacter, lambda: calls.append("compacter"))
    )
    monkeypatch.setattr(module, "dense", spy(module.dense, lambda: calls and calls.pop()))
    return calls


def models(
    name: str, precision: Precision, config: Any = COMPACTER
) -> tuple[nn.Module, nn.Module, nn.Module]:
    fp32 = precision.adapters_fp32
    fast = adapted(name, config, dtype=precision.weights, adapters_fp32=fp32)
    exact = copy.deepcopy(fast).double()
    plain = copy.deepcopy(fast)
    if not precision.autocast:
        plain.to(precision.weights)
    pelt_fast.accelerate(fast)
    return plain, fast, exact


def in_dtypes_of(results: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(like[name].dtype) for name, value in results.items()}


@pytest.mark.parametrize("precision", [FP32, BF16, AUTOCAST], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_outputs_and_every_gradient(name, precision, kronecker) -> None:
    batch = ARCHITECTURES[name].batch()
    plain, fast, exact = models(name, precision)
    exact = one_step(exact, batch)
    with precision():
        theirs = one_step(plain, batch)
        ours = one_step(fast, batch)
    assert len(kronecker) == LAYERS[name]
    assert any("shared_parameters.a.phm_rule" in key for key in ours)
    ours = in_dtypes_of(ours, theirs)
    assert_as_accurate(ours, theirs, exact, precision.computed, LAYERS[name])


@pytest.mark.parametrize("name", ["bert", pytest.param("t5", marks=pytest.mark.slow), "llama"])
def test_three_optimizer_steps(name) -> None:
    runs = []
    for first in (0, 3, 6):
        batches = [ARCHITECTURES[name].batch(seed=first + step) for step in range(3)]
        plain, fast, exact = models(name, FP32)
        ours, theirs, truth = (three_steps(model, batches) for model in (fast, plain, exact))
        runs.append((ours, theirs, truth))
    assert_as_accurate_in_the_middle(runs, FP32.computed, 3 * LAYERS[name])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_fp64(form, kronecker) -> None:
    plain = adapted("bert", COMPACTER.replace(**FORMS[form])).double()
    fast = copy.deepcopy(plain)
    report = pelt_fast.accelerate(fast)
    assert not report.left
    assert not report.waiting
    expected, actual = one_step(plain, BATCH), one_step(fast, BATCH)
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= 1e-11 * (value.norm() + 1e-4 * largest), key
    assert len(kronecker) == (0 if form in ("not_factorized", "rank_2") else 4)


def test_report_says_what_runs() -> None:
    report = pelt_fast.accelerate(adapted("bert", COMPACTER))
    assert "4 x 32 -> 16, 4 Kronecker products, sequential, gelu, float32" in str(report)


def test_compositions_and_switching_of_adapters(kronecker) -> None:
    plain = adapted("bert", COMPACTER, HOULSBY, COMPACTER).double().eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    for setup in (
        *("a", "c", Stack("a", "b", "c")),
        BatchSplit("a", "b", batch_sizes=[1, 2]),
        "b",
    ):
        results = []
        for model in (plain, fast):
            model.set_active_adapters(setup)
            results.append(model(**BATCH).logits)
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)
    assert len(kronecker) == 4 * (1 + 1 + 2 + 1)


def test_a_fuse_leaves_it_to_the_library() -> None:
    plain = adapted("bert", COMPACTER, COMPACTER)
    plain.add_adapter_fusion(["a", "b"])
    plain.set_active_adapters(adapters.Fuse("a", "b"))
    plain.double().eval()
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    torch.testing.assert_close(fast(**BATCH).logits, plain(**BATCH).logits, rtol=1e-11, atol=1e-13)


def test_hooks_on_a_projection_are_obeyed(kronecker) -> None:
    model = adapted("bert", COMPACTER).eval()
    pelt_fast.accelerate(model)
    seen = []
    layer = model.bert.encoder.layer[0].output.adapters["a"]
    layer.adapter_up.register_forward_hook(lambda *args: seen.append(1))
    model(**BATCH)
    assert (len(seen), len(kronecker)) == (1, 3)


def test_gradient_checkpointing() -> None:
    fast = adapted("bert", COMPACTER)
    pelt_fast.accelerate(fast)
    again = copy.deepcopy(fast)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    expected, actual = one_step(fast, BATCH), one_step(again, BATCH)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value)


def test_without_grad_it_is_the_same(kronecker) -> None:
    """Then nothing goes through the dispatcher, and nothing else may differ."""
    model = adapted("bert", COMPACTER).eval()
    pelt_fast.accelerate(model)
    expected = model(**BATCH).logits
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, expected)
    with torch.inference_mode():
        assert torch.equal(model(**BATCH).logits, expected)
    assert len(kronecker) == 12


# --- files


def bare(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of which the library's files lack the rule, and its inputs."""
    batch = ARCHITECTURES[name].batch()
    model = plain_model(name)
    if name == "bert":
        model, batch = model.base_model, {"input_ids": batch["input_ids"]}
    return model.eval(), batch


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0] if "labels" not in batch else model(**batch).logits


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_saved_and_loaded_by_the_library_alone(name, safe, tmp_path) -> None:
    model, batch = bare(name)
    model.add_adapter("a", config=COMPACTER)
    model.set_active_adapters("a")
    randomize(model)
    pelt_fast.accelerate(model)
    expected = output(model, batch)
    pelt_fast.restore(model)
    lost, kept = tmp_path / "lost", tmp_path / "kept"
    model.save_adapter(str(lost), "a", use_safetensors=safe)
    save_adapter(model, kept, "a", use_safetensors=safe)
    for folder, right in ((lost, False), (kept, True)):
        for load_as in (None, "other"):
            torch.manual_seed(7)
            fresh, _ = bare(name)
            fresh.load_state_dict(model.state_dict(), strict=False)
            loaded = fresh.load_adapter(
                str(folder), load_as=load_as, use_safetensors=safe, set_active=True
            )
            rules = [
                dict(m.named_parameters())[f"shared_parameters.{n}.phm_rule"]
                for m, n in ((fresh, loaded), (model, "a"))
            ]
            # the day that the first stops to fail, the library's files are complete
            assert torch.equal(*rules) is right
            if right:
                pelt_fast.accelerate(fresh)
                assert torch.equal(output(fresh, batch), expected)


def test_files_of_models_with_a_head_stay_the_librarys(tmp_path) -> None:
    model = adapted("bert", COMPACTER)
    pelt_fast.accelerate(model)
    model.save_adapter(str(tmp_path / "theirs"), "a")
    save_adapter(model, tmp_path / "ours", "a")
    for file in ("pytorch_adapter.bin", "adapter_config.json"):
        theirs, ours = (tmp_path / folder / file for folder in ("theirs", "ours"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_save_adapter_of_another_model(tmp_path) -> None:
    with pytest.raises(TypeError, match="model is a Linear; expected a model of the adapters"):
        save_adapter(nn.Linear(2, 2), tmp_path, "a")


def test_a_layer_of_ours_reads_the_librarys_parameters() -> None:
    model = adapted("bert", COMPACTER).double().eval()
    place = model.bert.encoder.layer[0].output
    theirs = place.adapters["a"]
    ours = pelt_fast.nn.Compacter.from_config(COMPACTER, 32, dtype=torch.float64)
    rule = model.bert.shared_parameters["a"]["phm_rule"]
    assert not ours.load_state_dict({**theirs.state_dict(), "phm_rule": rule}).missing_keys
    seen = []
    place.register_forward_hook(lambda module, args, y: seen.append((args, y)))
    dense = []
    place.dense.register_forward_hook(lambda module, args, y: dense.append(y))
    model(**BATCH)
    (_, stream), y = seen[0]
    torch.testing.assert_close(ours(dense[0], stream, place.LayerNorm), y)
    assert adapters_weights.weights_of(theirs.adapter_up).bias is theirs.adapter_up.b
