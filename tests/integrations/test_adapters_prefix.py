"""Prefix tuning of the `adapters` library: accelerated models compute what the library computes.

The models are small, and so is what they attend to: there concatenating costs less. ``folds`` makes attention take keys
and values in parts all the same, wherever it may.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import torch
import torch.nn.functional as F
import transformers
from adapters import PrefixTuningConfig, UniPELTConfig
from adapters.composition import BatchSplit, Parallel, Stack
from adapters.methods.prefix_tuning import PrefixTuning, PrefixTuningLayer
from torch import Tensor, nn

import pelt_fast
from pelt_fast.dispatch import problem
from pelt_fast.integrations import adapters_prefix, deferred
from pelt_fast.integrations.adapters_prefix import FastPrefixTuning, FastPrefixTuningLayer
from pelt_fast.integrations.deferred import PrefixedMask, PrefixedStates

from .adapters_models import plain_model
from .conftest import ARCHITECTURES
from .parity import assert_as_accurate, assert_equal_but_for_rounding, one_step, three_steps

MLP = PrefixTuningConfig(prefix_length=5, bottleneck_size=12)
FLAT = PrefixTuningConfig(prefix_length=4, flat=True)
GATED = MLP.replace(use_gating=True)
TWO_GATES = FLAT.replace(use_gating=True, shared_gating=False)
CONFIGS = {"mlp": MLP, "flat": FLAT, "gated": GATED, "two_gates": TWO_GATES}
MODELS = ("bert", "roberta", "llama", "gpt2", "t5")
# whose attention is scaled_dot_product_attention with a mask that is added, and as many heads of keys as of queries
FOLDED = ("bert", "roberta")
BATCH = ARCHITECTURES["bert"].batch()


def adapted(architecture: str = "bert", *configs: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model with prefixes "a", "b", ...: "a" active and in training."""
    model: Any = plain_model(architecture)
    names = [chr(ord("a") + i) for i in range(max(1, len(configs)))]
    for name, config in zip(names, configs or (MLP,), strict=True):
        model.add_adapter(name, config=config)
    model.train_adapter("a")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".prefix_gates." in name:  # the library's start near one half everywhere
                parameter.mul_(20)
    return model.to(dtype)


def both(*args: Any, **options: Any) -> tuple[Any, Any]:
    """The library's and the accelerated one."""
    plain = adapted(*args, **options)
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    return plain, fast


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of attention in parts."""
    calls: list[Tensor] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(pelt_fast.functional.prefix_attention(*args, **options))
        return calls[-1]

    monkeypatch.setattr(adapters_prefix, "FEW_KEYS", 0)
    monkeypatch.setattr(problem, "FEW_KEYS", 0)
    monkeypatch.setattr(deferred, "prefix_attention", counted)
    return calls


def same(plain: Any, fast: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        theirs, ours = plain(**batch, **options), fast(**batch, **options)
    assert_equal_but_for_rounding(ours.logits, theirs.logits)
    return ours


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("architecture", MODELS)
def test_inference(architecture: str, config: str, folds) -> None:
    plain, fast = (m.eval() for m in both(architecture, CONFIGS[config]))
    batch = ARCHITECTURES[architecture].batch()
    for _ in range(2):
        same(plain, fast, batch)
    without = {key: value for key, value in batch.items() if key != "attention_mask"}
    same(plain, fast, without)
    assert len(folds) == (3 * 2 if architecture in FOLDED else 0)


@pytest.mark.parametrize("config", ["mlp", "two_gates"])
@pytest.mark.parametrize("architecture", MODELS)
def test_gradients_and_steps(architecture: str, config: str) -> None:
    plain, fast = both(architecture, CONFIGS[config])
    exact = copy.deepcopy(plain).double()
    batches = [ARCHITECTURES[architecture].batch(seed=seed) for seed in range(3)]
    steps = [one_step(model, batches[0]) for model in (fast, plain, exact)]
    assert_as_accurate(*steps, torch.float32, 14)
    assert any("prefix" in name for name in steps[0])
    moved = [three_steps(model, batches) for model in (fast, plain, exact)]
    assert_as_accurate(*moved, torch.float32, 14)


def test_the_mlp_runs_once_for_all_samples_and_only_when_it_changes() -> None:
    _, fast = both("bert")
    rows: list[int] = []
    (module,) = (m for m in fast.modules() if isinstance(m, PrefixTuning))

    class Counted(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            rows.append(x.numel() // 12)
            return super().forward(x)

    module.control_trans[1].f = Counted()
    fast(**BATCH).loss.backward()
    assert rows == [5]
    fast.eval()
    with torch.no_grad():
        first = fast(**BATCH).logits
        assert torch.equal(fast(**BATCH).logits, first)
        assert rows == [5, 5]
        module.wte.weight.mul_(0.5)
        assert not torch.equal(fast(**BATCH).logits, first)
        assert rows == [5, 5, 5]


def test_dropout_draws_what_the_library_draws() -> None:
    plain, fast = both("bert", MLP.replace(dropout=0.4))
    results = []
    for model in (plain.train(), fast.train()):
        torch.manual_seed(3)
        results.append(one_step(model, BATCH))
    for name, expected in results[0].items():
        assert_equal_but_for_rounding(results[1][name], expected, name)


@pytest.mark.parametrize(
    "setup",
    [
        Stack("a", "b"),
        BatchSplit("a", "b", batch_sizes=[1, 2]),
        BatchSplit("a", Stack("b", "c"), batch_sizes=[3, 0]),
        Parallel("a", "b"),
        Parallel(Stack("a", "b"), "c"),
        Stack("b", "c", "a"),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_compositions(architecture: str, setup: Any, folds) -> None:
    plain, fast = (m.eval() for m in both(architecture, MLP, FLAT, GATED))
    batch = ARCHITECTURES[architecture].batch()
    batch.pop("labels")  # Parallel repeats the batch, and no labels
    for model in (plain, fast):
        model.set_active_adapters(setup)
    same(plain, fast, batch)
    assert (len(folds) == 2) == (architecture == "bert" and type(setup) is Stack)
    results = [model(**batch).logits.sum() for model in (plain, fast)]
    for loss in results:
        loss.backward()
    for theirs, ours in zip(plain.parameters(), fast.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None)
        if theirs.grad is not None:
            assert_equal_but_for_rounding(ours.grad, theirs.grad)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generation(architecture: str, folds) -> None:
    plain, fast = (m.eval() for m in both(architecture, MLP))
    ids = {"input_ids": ARCHITECTURES[architecture].batch()["input_ids"]}
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = plain.generate(**ids, **options, output_scores=True, return_dict_in_generate=True)
    found = fast.generate(**ids, **options, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert_equal_but_for_rounding(ours, theirs)


def test_decoding_does_not_copy_the_cache(folds) -> None:
    """One token at a time nothing is masked: each step after the first attends in parts, in both layers."""
    plain, fast = (m.eval() for m in both("gpt2", FLAT))
    ids = ARCHITECTURES["gpt2"].batch()["input_ids"]
    logits = []
    for model in (plain, fast):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                for i in range(ids.shape[1])
            ]
        logits.append(torch.cat(parts, 1))
    assert_equal_but_for_rounding(logits[1], logits[0])
    assert len(folds) == 2 * ids.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, folds) -> None:
    plain, fast = (m.eval() for m in both("bert", GATED, dtype=dtype))
    same(plain, fast, BATCH)
    assert len(folds) == 2


def test_autocast_and_inference_mode(folds) -> None:
    plain, fast = (m.eval() for m in both("bert", GATED))
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (m(**BATCH) for m in (plain, fast))
    assert_equal_but_for_rounding(ours.logits, theirs.logits)
    with torch.inference_mode():
        theirs, ours = (m(**BATCH) for m in (plain, fast))
    assert_equal_but_for_rounding(ours.logits, theirs.logits)
    assert len(folds) == 2
    fast(**BATCH).loss.backward()  # nothing of inference mode has stayed


def test_gradient_checkpointing() -> None:
    results = []
    for model in both("bert", GATED):
        model.train()
        model.gradient_checkpointing_enable()
        results.append(one_step(model, BATCH))
    for name, expected in results[0].items():
        assert_equal_but_for_rounding(results[1][name], expected, name)


def test_whoever_wants_attentions_or_gating_scores_gets_them(folds) -> None:
    plain, fast = (m.eval() for m in both("bert", TWO_GATES))
    with torch.no_grad():
        theirs, ours = (m(**BATCH, output_attentions=True) for m in (plain, fast))
        for a, b in zip(ours.attentions, theirs.attentions, strict=True):
            assert_equal_but_for_rounding(a, b)
        theirs, ours = (m(**BATCH, output_adapter_gating_scores=True) for m in (plain, fast))
    scores, expected = ours.adapter_gating_scores["a"], theirs.adapter_gating_scores["a"]
    assert scores.keys() == expected.keys() == {0, 1}
    for layer in expected:
        for location in expected[layer]:
            assert scores[layer][location] == pytest.approx(expected[layer][location])


def test_unipelt(folds) -> None:
    plain, fast = (m.eval() for m in both("bert", UniPELTConfig()))
    same(plain, fast, BATCH)
    assert len(folds) == 2


def test_what_the_library_does_to_a_model_is_seen(folds) -> None:
    plain, fast = (m.eval() for m in both("bert", MLP))
    for model in (plain, fast):
        model.add_adapter("new", config=FLAT.replace(init_weights_seed=1))
        model.set_active_adapters("new")
    same(plain, fast, BATCH)
    for model in (plain, fast):
        model.eject_prefix_tuning("a")
        model.set_active_adapters("a")
    same(plain, fast, BATCH)
    for model in (plain, fast):
        model.delete_adapter("new")
        model.adapters_config.skip_layers = [0]
    same(plain, fast, BATCH)
    for model in (plain, fast):
        model.adapters_config.skip_layers = None
        model.set_active_adapters(None)
    same(plain, fast, BATCH)
    assert len(folds) == 2 + 2 + 1


def test_report_and_restore() -> None:
    model = adapted("bert", MLP, FLAT)
    types = [type(module) for module in model.modules()]
    report = pelt_fast.accelerate(model)
    prefixes = [name for name in report.replaced if "prefix" in name]
    assert len(prefixes) == 2 + 1  # both layers, and the MLP
    assert "prefix 5 x 32 -> 12 -> 128, float32: once for all samples" in str(report)
    assert "2 x attention over a prefix: folded in" in str(report)
    assert not any("prefix" in name for name in report.left)
    assert sum(isinstance(m, FastPrefixTuningLayer) for m in model.modules()) == 2
    assert sum(isinstance(m, FastPrefixTuning) for m in model.modules()) == 1
    again = pelt_fast.accelerate(model)
    assert set(prefixes) <= set(again.already)
    model.set_active_adapters(None)
    idle = pelt_fast.accelerate(model).idle
    assert [idle[name] for name in prefixes if name in idle].count(
        "the active adapters are not on this layer"
    ) == 2
    pelt_fast.restore(model)
    assert [type(module) for module in model.modules()] == types


def test_what_is_left_says_why() -> None:
    model = adapted("t5")
    report = pelt_fast.accelerate(model)
    reasons = {reason for name, reason in report.waiting.items() if name.endswith("prefix_tuning")}
    assert reasons == {"its attention is not scaled_dot_product_attention"}
    model = adapted("bert")
    layer = next(m for m in model.modules() if isinstance(m, PrefixTuningLayer))
    layer.compose_single = lambda *args, **options: type(layer).compose_single(
        layer, *args, **options
    )
    mlp = next(m for m in model.modules() if isinstance(m, PrefixTuning))
    mlp.control_trans.register_forward_hook(lambda *args: None)
    report = pelt_fast.accelerate(model)
    assert "it has a compose_single of its own" in report.left.values()
    assert "control_trans has hooks" in report.waiting.values()
    assert model(**BATCH).logits.isfinite().all()


def test_files_are_the_library_s(tmp_path: Path) -> None:
    plain, fast = both("bert", GATED)
    for name, model in (("plain", plain), ("fast", fast)):
        model.save_adapter(tmp_path / name, "a")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "fast").iterdir())
    for name in files:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.mul_(-1.5)
    fast.eval()
    same(copy.deepcopy(fast), fast, BATCH)  # so that whatever is kept is there to be stale
    plain.save_adapter(tmp_path / "new", "a")
    fast.load_adapter(str(tmp_path / "new"), load_as="a", set_active=True)
    fast.classifier.load_state_dict(plain.classifier.state_dict())
    same(plain.eval(), fast.eval(), BATCH)


# ---- tensors that are not concatenated ----


def parts() -> tuple[PrefixedStates, PrefixedMask, Tensor, Tensor]:
    torch.manual_seed(0)
    prefix, rest = torch.randn(1, 2, 3, 8).expand(2, -1, -1, -1), torch.randn(2, 2, 5, 8)
    mask = torch.randn(2, 1, 4, 5)
    states = PrefixedStates.of(prefix, rest)
    return states, PrefixedMask.of(mask, 3), torch.cat([prefix, rest], 2), F.pad(mask, (3, 0))


def test_a_deferred_tensor_is_the_concatenated_one() -> None:
    states, mask, whole, whole_mask = parts()
    assert (states.shape, mask.shape) == (whole.shape, whole_mask.shape)
    assert (states.dtype, states.device, states.dim(), states.size(2)) == (
        *(whole.dtype, whole.device),
        *(4, 8),
    )
    assert states._whole is None
    operations = (
        lambda t: t.transpose(2, 3),
        lambda t: t @ t.mT,
        lambda t: torch.cat([t, t], 1),
        lambda t: t[:, :, 1:],
        lambda t: t.numpy(),
        lambda t: (t + 1, t.sum(), 2 * t)[1],
        lambda t: F.pad(t, (1, 1)),
        lambda t: t.requires_grad,
    )
    for operation in operations:
        found, expected = operation(parts()[0]), operation(whole)
        assert type(found) is type(expected)
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert mask[:, :, :, :8] is mask
    assert torch.equal(mask[:, :, :, :7], whole_mask[..., :7])
    states.mul_(2)  # in place, as the concatenated tensor would be
    assert torch.equal(states.clone(), 2 * whole)


def test_attention_of_deferred_tensors(folds) -> None:
    states, mask, whole, whole_mask = parts()
    query, other = torch.randn(2, 2, 4, 8), PrefixedStates.of(torch.randn(2, 2, 3, 8), states.rest)
    values = torch.cat([other.prefix, other.rest], 2)

    def check(expect: int, ours: Any, theirs: Any, **options: Any) -> None:
        folds.clear()
        torch.manual_seed(0)
        found = F.scaled_dot_product_attention(query, *ours, **options)
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(query, *theirs, **options)
        assert_equal_but_for_rounding(found, expected)
        assert len(folds) == expect

    check(1, (states, other), (whole, values))
    check(1, (states, other, mask), (whole, values, whole_mask))
    check(1, (states, other), (whole, values), scale=0.1)
    check(0, (states, other), (whole, values), is_causal=True)
    fresh = parts()[0]
    check(0, (fresh, other), (whole, values), dropout_p=0.5)
    fresh, fresh_mask, *_ = parts()
    check(0, (fresh, values, fresh_mask), (whole, values, whole_mask))


def test_a_prefix_before_a_prefix() -> None:
    states, mask, whole, whole_mask = parts()
    more = torch.randn(2, 2, 2, 8)
    longer = PrefixedStates.of(more, states)
    assert longer.rest is states.rest
    assert torch.equal(longer.whole(), torch.cat([more, whole], 2))
    assert torch.equal(PrefixedMask.of(mask, 2).whole(), F.pad(whole_mask, (2, 0)))


def test_every_layer_of_the_library_that_has_no_prefix_is_passed_by() -> None:
    model: nn.Module = plain_model("bert")
    model.add_adapter("a", config=adapters.SeqBnConfig())
    report = pelt_fast.accelerate(model)
    assert not any("prefix" in name for name in (*report.replaced, *report.left))
