"""A batch whose samples have setups of their own: each gets what its setup gives it alone, in forward and training."""

from __future__ import annotations

import copy
import functools
import math
import threading
from typing import Any

import pytest

pytest.importorskip("adapters")

import adapters
import torch
import transformers
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Stack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pelt_fast
from pelt_fast.integrations import adapters_mixed, adapters_mixed_lora, stacked_lora
from pelt_fast.integrations.fast_class import Accelerated

from .adapters_models import plain_model
from .conftest import ARCHITECTURES, VOCABULARY, Architecture
from .parity import AUTOCAST, BF16, FP32, Precision, assert_as_accurate, gradients

CONFIGS = {
    "lora": adapters.LoRAConfig(r=4, alpha=16, intermediate_lora=True),
    "wide": adapters.LoRAConfig(r=8, alpha=4, attn_matrices=["q", "k"]),
    "adapter": adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    "other": adapters.DoubleSeqBnConfig(reduction_factor=8, non_linearity="gelu"),
    "prefix": adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=12),
    "unipelt": adapters.ConfigUnion(
        adapters.LoRAConfig(r=3, use_gating=True),
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=12, use_gating=True),
        adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu", use_gating=True),
    ),
}
FUSE = Fuse("adapter", "fused")
SETUPS = ["lora", "unipelt", None, "adapter", FUSE, "prefix", "wide", "unipelt", "other", "lora"]


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=48,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _relative() -> nn.Module:
    """BERT whose attention depends on the distance of columns."""
    config = copy.deepcopy(ARCHITECTURES["bert"].build().config)
    config.position_embedding_type = "relative_key_query"
    return transformers.BertForSequenceClassification(config)


def _decoder() -> nn.Module:
    """BERT whose attention is causal, without a mask where there is no padding."""
    config = copy.deepcopy(ARCHITECTURES["bert"].build().config)
    config.is_decoder = True
    return transformers.BertLMHeadModel(config)


_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _electra() -> nn.Module:
    config = transformers.ElectraConfig(embedding_size=32, **_SMALL, **_STILL)
    return transformers.ElectraForSequenceClassification(config)


def _xlm_roberta() -> nn.Module:
    config = transformers.XLMRobertaConfig(**_SMALL, **_STILL)
    return transformers.XLMRobertaForSequenceClassification(config)


def _mistral() -> nn.Module:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(num_key_value_heads=1, **_SMALL)
    )


def _mt5() -> nn.Module:
    config = transformers.MT5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.MT5ForConditionalGeneration(config)


MODELS = ["bert", "roberta", "distilbert", "t5", "gpt2", "llama", "decoder"]
MORE_MODELS = ["electra", "xlm-roberta", "mistral", "mt5"]  # whose code is that of one above
OTHER_ARCHITECTURES = (
    Architecture("distilbert", _distilbert, (), 0, classes=2),
    Architecture("relative", _relative, (), 0, classes=2),
    Architecture("decoder", _decoder, (), 0),
    Architecture("electra", _electra, (), 0, classes=2),
    Architecture("xlm-roberta", _xlm_roberta, (), 0, classes=2),
    Architecture("mistral", _mistral, (), 0),
    Architecture("mt5", _mt5, (), 0),
)


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models for these tests alone."""
    for architecture in OTHER_ARCHITECTURES:
        monkeypatch.setitem(ARCHITECTURES, architecture.name, architecture)


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (noise / math.sqrt(parameter.shape[-1])).to(parameter.dtype)


def is_adapter(name: str) -> bool:
    parts = ("lora", "gate", "adapter", "prefix", "shared_parameters")
    return any(part in name for part in parts)


def model_of(
    architecture: str = "bert",
    configs: dict[str, Any] = CONFIGS,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
) -> Any:
    """An accelerated model with all adapters, random, and everything in training mode that is theirs."""
    model: Any = plain_model(architecture, dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    if "adapter" in configs:
        model.add_adapter("fused", config=CONFIGS["adapter"])
        model.add_adapter_fusion(FUSE)
    model.to(dtype)
    randomize(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    model.get_input_embeddings().weight.requires_grad_(True)
    pelt_fast.accelerate(model)
    return model.eval()


def batch_of(architecture: str, rows: int = len(SETUPS), masked: bool = True) -> dict[str, Tensor]:
    batch = ARCHITECTURES[architecture].batch(rows=rows)
    labels = batch.pop("labels")
    if architecture in ("t5", "mt5"):
        batch["decoder_input_ids"] = labels[:, :4]
    if not masked:
        del batch["attention_mask"]
    return batch


def loss_of(logits: Tensor) -> Tensor:
    """A sum over samples, so that they can be computed apart."""
    return logits.double().square().mean(dim=tuple(range(1, logits.dim()))).sum()


def together(model: Any, batch: dict[str, Tensor], setups: list[Any] = SETUPS) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with pelt_fast.mixed_batch(model, setups):
        logits = model(**batch).logits
    if torch.is_grad_enabled():
        loss_of(logits).backward()
    return {"logits": logits.detach(), **gradients(model)}


def apart(model: Any, batch: dict[str, Tensor], setups: list[Any] = SETUPS) -> dict[str, Tensor]:
    """The batch once for each setup, with the library's own way to choose it, and of that the setup's samples.

    Not the samples one by one: whether a batch has padding is not for one sample to say.
    """
    model.zero_grad(set_to_none=True)
    active, found = model.active_adapters, {}
    for setup in setups:
        if str(setup) not in found:
            rows = [row for row, other in enumerate(setups) if str(other) == str(setup)]
            model.set_active_adapters(setup)
            logits = model(**batch).logits[rows]
            if torch.is_grad_enabled():
                loss_of(logits).backward()
            found[str(setup)] = dict(zip(rows, logits.detach(), strict=True))
    model.set_active_adapters(active)
    logits = torch.stack([found[str(setup)][row] for row, setup in enumerate(setups)])
    return {"logits": logits, **gradients(model)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], error: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        size = value.double().norm().clamp_min(1e-6)
        distance = (ours[name].double() - value.double()).norm() / size
        assert distance <= error, name


@pytest.mark.parametrize(
    ("architecture", "masked"),
    [
        pytest.param(name, masked, marks=[] if quick else pytest.mark.slow)
        for name in (*MODELS, *MORE_MODELS)
        for masked in (True, False)
        for quick in [name in MODELS and (masked or name in ("bert", "decoder"))]
        # transformers makes no mask for it in float64
        if not (masked and name == "decoder")
    ],
)
def test_each_sample_as_alone(architecture: str, masked: bool) -> None:
    model, batch = model_of(architecture), batch_of(architecture, masked=masked)
    plain = copy.deepcopy(model)
    pelt_fast.restore(plain)
    expected = apart(plain, batch)
    error = error_of(architecture)
    assert_same(together(model, batch), expected, error)
    with torch.no_grad():
        for _ in range(2):
            with pelt_fast.mixed_batch(model, SETUPS):
                logits = model(**batch).logits
            assert_same({"logits": logits}, {"logits": expected["logits"]}, error)


def error_of(architecture: str, attention: str = "sdpa") -> float:
    """Of float64; T5 and Llama's eager attention take the softmax in float32, whatever they compute in."""
    rounds = architecture in ("t5", "mt5") or (architecture == "llama" and attention == "eager")
    return 1e-4 if rounds else 1e-10


OTHERS = {
    "compacter": adapters.CompacterConfig(reduction_factor=4, phm_dim=2),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=12),
        adapters.ParBnConfig(reduction_factor=4, non_linearity="gelu"),
    ),
    "madx": adapters.SeqBnInvConfig(reduction_factor=4, non_linearity="gelu"),
    "ia3": adapters.IA3Config(),
    "lora": CONFIGS["lora"],
    "adapter": CONFIGS["adapter"],
    "gated": CONFIGS["unipelt"],
}


@pytest.mark.parametrize(
    "architecture",
    ["bert", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "llama"))],
)
def test_other_methods_and_blocks(architecture: str) -> None:
    model, batch = model_of(architecture, OTHERS), batch_of(architecture)
    setups = [
        *("mam", "compacter", "madx", None, "ia3", Stack("madx", "gated"), "lora"),
        *(Average("adapter", "fused"), Stack("lora", FUSE), Stack("gated", "mam")),
    ]
    if architecture == "gpt2":  # the library's projection of GPT-2 takes no composition
        setups[5], setups[8], setups[9] = "madx", "gated", "mam"
    plain = copy.deepcopy(model)
    pelt_fast.restore(plain)
    assert_same(together(model, batch, setups), apart(plain, batch, setups), error_of(architecture))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "relative"])
def test_eager_attention(architecture: str, masked: bool) -> None:
    model = model_of(architecture, attention="eager")
    batch = batch_of(architecture, masked=masked)
    with torch.no_grad():
        expected = apart(model, batch)
        assert_same(together(model, batch), expected, error_of(architecture, "eager"))


@pytest.mark.parametrize(
    "architecture", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "llama"))]
)
def test_checkpointing(architecture: str) -> None:
    model, batch = model_of(architecture).train(), batch_of(architecture)
    expected = together(model, batch)
    model.gradient_checkpointing_enable()
    assert_same(together(model, batch), expected, error_of(architecture))


# How it is computed


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the LoRA layers that took all samples in one call."""
    inputs: list[Tensor] = []
    original = adapters_mixed_lora.multi_lora_linear

    def spy(x: Tensor, *args: Any, **options: Any) -> Tensor:
        inputs.append(x)
        return original(x, *args, **options)

    monkeypatch.setattr(adapters_mixed_lora, "multi_lora_linear", spy)
    return inputs


def test_one_call_for_all_loras(calls: list[Tensor]) -> None:
    model, batch = model_of(), batch_of("bert")
    together(model, batch)
    assert len(calls) == 2 * 4, "queries, keys, values and the intermediate layer"
    assert all(len(x) == len(SETUPS) for x in calls)
    calls.clear()
    together(model, batch, ["lora"] * len(SETUPS))
    assert not calls, "with one setup it is the call without a mixed batch"
    together(model, batch, [None, "adapter"] * 5)
    assert not calls


def test_stacks_are_kept_until_they_change() -> None:
    model, batch = model_of().eval(), batch_of("bert")
    with torch.no_grad():
        before = together(model, batch)
        layer = next(m for m in model.modules() if m in stacked_lora._kept)
        kept = stacked_lora._kept[layer]
        together(model, batch)
        assert stacked_lora._kept[layer] is kept
        for name, parameter in model.named_parameters():
            if ".loras." in name:
                parameter.mul_(-2)
        after, expected = together(model, batch), apart(model, batch)
    assert not torch.equal(before["logits"], after["logits"])
    assert_same(after, expected)
    pelt_fast.restore(model)
    assert not any(module in stacked_lora._kept for module in model.modules())


def test_an_adapter_without_a_sample_gets_no_gradient() -> None:
    model, batch = model_of(), batch_of("bert", rows=3)
    found = together(model, batch, ["lora", None, "adapter"])
    named = {name for name in CONFIGS if any(f".{name}." in key for key in found)}
    assert named == {"lora", "adapter"}


def test_samples_in_order_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Tensor:
        raise AssertionError("rows were moved")

    model, batch = model_of(), batch_of("bert", rows=6)
    setups = [None, None, "adapter", "adapter", FUSE, "other"]
    expected = apart(model, batch, setups)
    monkeypatch.setattr(adapters_mixed, "_reordered", fail)
    assert_same(together(model, batch, setups), expected)


@pytest.mark.parametrize("precision", [FP32, BF16, AUTOCAST], ids=lambda p: p.name)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_precisions(architecture: str, precision: Precision) -> None:
    model, batch = model_of(architecture, dtype=precision.weights), batch_of(architecture)
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # softmax takes it away: its gradient is rounding alone
            parameter.requires_grad_(False)
    exact = apart(copy.deepcopy(model).double(), batch)
    with precision():
        theirs, ours = apart(model, batch), together(model, batch)
    assert_as_accurate(ours, theirs, exact, precision.computed, 14)


def test_dropout_acts_on_each_sample() -> None:
    dropping = {
        "lora": adapters.LoRAConfig(r=4, alpha=16, dropout=0.5),
        "wide": adapters.LoRAConfig(r=8, dropout=0.5, attn_matrices=["q"]),
        "unequal": adapters.LoRAConfig(r=8, dropout=0.25, attn_matrices=["v"]),
        "adapter": adapters.SeqBnConfig(reduction_factor=4, dropout=0.5),
        "prefix": adapters.PrefixTuningConfig(prefix_length=4, flat=True, dropout=0.5),
    }
    model, batch = model_of("bert", dropping), batch_of("bert", rows=6)
    setups = ["lora", "adapter", None, "prefix", "wide", "unequal"]
    with torch.no_grad():
        assert_same(together(model, batch, setups), apart(model, batch, setups))
        model.train()
        torch.manual_seed(3)
        first = together(model, batch, setups)["logits"]
        second = together(model, batch, setups)["logits"]
        torch.manual_seed(3)
        assert torch.equal(together(model, batch, setups)["logits"], first)
        changed = (first != second).all(1)
        assert changed.tolist() == [True, True, False, True, True, True]
    layer = model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(len(setups), 1, 32, dtype=torch.float64)
    with torch.no_grad(), pelt_fast.mixed_batch(model, setups):
        drawn = layer(x.expand(-1, 4000, -1))
        layer.eval()
        right = layer(x)
    assert torch.equal(
        drawn.std(1).mean(1) > 1e-12, torch.tensor([row in (0, 4) for row in range(6)])
    )
    error = (drawn.mean(1, keepdim=True) - right).abs()
    assert (error <= 6 * drawn.std(1, keepdim=True) / math.sqrt(4000) + 1e-12).all()


# What it must not disturb


def test_state_is_as_it_was() -> None:
    model, batch = model_of("bert", OTHERS), batch_of("bert", rows=3)
    model.set_active_adapters(Stack("lora", "adapter"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = [(type(m), m.training) for m in model.modules()], str(model.active_adapters)
    expected = model(**batch).logits
    setups = ["compacter", None, "mam"]  # compacter's shared rule is of no active adapter
    ours = together(model, batch, setups)
    with pytest.raises(KeyError, match="leave"), pelt_fast.mixed_batch(model, setups):
        raise KeyError("leave")
    with pytest.raises(ValueError, match="3 setups"), pelt_fast.mixed_batch(model, setups):
        model(**{key: value[:2] for key, value in batch.items()})
    assert before == (
        [(type(m), m.training) for m in model.modules()],
        str(model.active_adapters),
    )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(model(**batch).logits, expected)
    assert_same(ours, apart(model, batch, setups))


def test_a_backward_after_the_block_and_in_another_one() -> None:
    model, batch = model_of().train(), batch_of("bert")
    expected = together(model, batch)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    with pelt_fast.mixed_batch(model, SETUPS):
        logits = model(**batch).logits
    with pelt_fast.mixed_batch(model, list(reversed(SETUPS))):
        loss_of(logits).backward()
    assert_same({"logits": logits.detach(), **gradients(model)}, expected)


def test_threads() -> None:
    model, batch = model_of().eval(), batch_of("bert")
    mixtures = [SETUPS, list(reversed(SETUPS)), [None] * len(SETUPS), None]
    with torch.no_grad():
        model.set_active_adapters("wide")
        right = [
            model(**batch).logits if m is None else together(model, batch, m)["logits"]
            for m in mixtures
        ]
        found: list[list[Tensor]] = [[] for _ in mixtures]
        start = threading.Barrier(len(mixtures))

        def run(place: int) -> None:
            with torch.no_grad():
                start.wait()
                for _ in range(8):
                    setups = mixtures[place]
                    if setups is None:
                        found[place].append(model(**batch).logits)
                        continue
                    with pelt_fast.mixed_batch(model, setups):
                        found[place].append(model(**batch).logits)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(mixtures))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for expected, logits in zip(right, found, strict=True):
        assert len(logits) == 8
        for actual in logits:
            assert_same({"logits": actual}, {"logits": expected})


def test_training_together_is_training_alone() -> None:
    """Each user's parameters after steps of AdamW are those of the user alone."""
    users = {"lora": "lora", "adapter": "adapter", "unipelt": "unipelt"}
    start = model_of("bert")
    start.get_input_embeddings().weight.requires_grad_(False)
    rows = ["lora", "unipelt", "adapter", "adapter", "unipelt", "lora", None]
    batches = [ARCHITECTURES["bert"].batch(len(rows), seed=seed) for seed in range(4)]

    def trained(names: list[str], mine: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(start).train()
        own = {
            key: parameter
            for key, parameter in model.named_parameters()
            if any(f".{name}." in key for name in names)
        }
        optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
        for batch in batches:
            labels = batch["labels"]
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            optimizer.zero_grad()
            logits, targets = mine(model, inputs, labels)
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
            optimizer.step()
        return {key: parameter.detach() for key, parameter in own.items()}

    def mixed(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        with pelt_fast.mixed_batch(model, rows):
            return model(**inputs).logits, labels

    ours = trained(list(users), mixed)
    for name in users:

        def alone(
            model: Any, inputs: dict[str, Tensor], labels: Tensor, name: str = name
        ) -> tuple[Tensor, Tensor]:
            mine = [row for row, setup in enumerate(rows) if setup == name]
            model.set_active_adapters(name)
            return model(**{k: v[mine] for k, v in inputs.items()}).logits, labels[mine]

        theirs = trained([name], alone)
        before = dict(start.named_parameters())
        assert theirs
        assert not any(torch.equal(value, before[key]) for key, value in theirs.items())
        assert_same({key: ours[key] for key in theirs}, theirs, 1e-8)


# Generation


@pytest.mark.parametrize(
    "architecture", ["gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_generation(architecture: str) -> None:
    model = model_of(architecture).eval()
    model.config.use_cache = True
    setups = ["lora", "unipelt", None, "adapter", FUSE, "prefix"]
    ids = ARCHITECTURES[architecture].batch(rows=len(setups))["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids)}
    with pelt_fast.mixed_batch(model, setups):
        ours = model.generate(ids, **options)
        with pytest.raises(ValueError, match="a search with beams"):
            model.generate(ids, num_beams=2, **options)
    for row, setup in enumerate(setups):
        model.set_active_adapters(setup)
        assert torch.equal(ours[row], model.generate(ids, **options)[row]), setup
    model.set_active_adapters(None)
    if architecture == "t5":
        return
    with pelt_fast.mixed_batch(model, [setup for setup in setups for _ in range(2)]):
        ours = model.generate(ids, num_beams=2, **options)
    model.set_active_adapters("lora")
    assert torch.equal(ours[0], model.generate(ids, num_beams=2, **options)[0])


# What is not served


@pytest.mark.parametrize(
    ("setups", "error", "message"),
    [
        ("lora", TypeError, "setups is 'lora'; expected a list"),
        ([], ValueError, "setups is empty"),
        (["lora", 3], TypeError, r"setups\[1\] is 3; expected the name of an adapter"),
        (["lora", ""], TypeError, r"setups\[1\] is ''"),
        ([None, "nobody"], ValueError, r"setups\[1\] names the adapter 'nobody'; the model's are ad"),
        ([Parallel("lora", "wide")], ValueError, r"setups\[0\] .*: Parallel acts on a whole batch"),
        ([BatchSplit("lora", "wide", batch_sizes=1)], ValueError, "BatchSplit acts on a whole"),
        ([Fuse("adapter", "other")], ValueError, "no fusion layer 'adapter,other'; .* adapter,fused"),
        ([Fuse(Fuse("adapter", "fused"), "other")], ValueError, r"setups\[0\] .*Cannot nest"),
    ],
)  # fmt: skip
def test_errors_of_setups(setups: Any, error: type[Exception], message: str) -> None:
    model = _shared_model()
    with pytest.raises(error, match=message), pelt_fast.mixed_batch(model, setups):
        pass
    assert model.active_adapters is None


@functools.cache
def _shared_model() -> Any:
    return model_of()


def test_errors_of_models() -> None:
    model = plain_model("bert")
    model.add_adapter("lora", config="lora")
    with pytest.raises(ValueError, match=r"not accelerated; call pelt_fast.accelerate"):
        pelt_fast.mixed_batch(model, ["lora"])
    with pytest.raises(ValueError, match="has no layer of the adapters library"):
        pelt_fast.mixed_batch(nn.Linear(2, 2), ["lora"])
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        pelt_fast.mixed_batch("model", ["lora"])  # type: ignore[arg-type]
    key = model.bert.encoder.layer[1].attention.self.key
    key.compose_single = functools.partial(key.compose_single)  # so that it stays the library's
    pelt_fast.accelerate(model)
    with pytest.raises(ValueError, match="itself: not a wrapper"):
        pelt_fast.mixed_batch(nn.Sequential(model), ["lora"])
    model.add_adapter("later", config=adapters.LoRAConfig(attn_matrices=["k"]))
    with pytest.raises(
        ValueError, match=r"setups\[1\] \(Stack\[later\]\) acts on .*1\..*\.key, a LoRAL"
    ):
        pelt_fast.mixed_batch(model, ["lora", "later"])
    del key.compose_single
    pelt_fast.accelerate(model)
    with pelt_fast.mixed_batch(model, ["lora", "later"]):
        pass
    model.set_active_adapters(Parallel("lora", "later"))
    with pytest.raises(ValueError, match="which repeats the samples"):
        pelt_fast.mixed_batch(model, ["lora", "later"])
    model.set_active_adapters(None)
    with pelt_fast.mixed_batch(model, ["lora", "later"]):
        model.delete_adapter("later")
        with pytest.raises(ValueError, match="has 'later', deleted from the model since"):
            model(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (adapters.PromptTuningConfig(prompt_length=2), r"setups\[1\] \(Stack\[x\]\) has prompt tuning"),
        (adapters.LoReftConfig(), r"setups\[1\] \(Stack\[x\]\) acts on .*, a ReftLayer"),
        (
            adapters.SeqBnInvConfig(reduction_factor=4, inv_adapter="glow"),
            r"setups\[1\] \(Stack\[x\]\) has the invertible adapter 'x', a GLOWCoupling",
        ),
    ],
    ids=["prompt", "reft", "glow"],
)  # fmt: skip
def test_methods_that_are_not_served(config: Any, message: str) -> None:
    model: Any = plain_model("bert")
    model.add_adapter("lora", config="lora")
    model.add_adapter("x", config=config)
    pelt_fast.accelerate(model)
    with pytest.raises(ValueError, match=message):
        pelt_fast.mixed_batch(model, ["lora", "x", "x"])


def test_heads() -> None:
    model: Any = adapters.BertAdapterModel(ARCHITECTURES["bert"].build().config)
    for name in ("lora", "adapter"):
        model.add_adapter(name, config=CONFIGS[name])
    model.add_classification_head("lora")
    model.add_classification_head("shared")
    pelt_fast.accelerate(model)
    model.active_head = "shared"
    with pytest.raises(
        ValueError, match=r"setups\[1\] .* a head of its own, 'lora', while 'shared'"
    ):
        pelt_fast.mixed_batch(model, ["adapter", "lora"])
    batch = batch_of("bert", rows=2)
    setups = ["adapter", None]
    model.eval()
    with torch.no_grad(), pelt_fast.mixed_batch(model, setups):
        logits = model(**batch).logits
    for row, setup in enumerate(setups):
        model.set_active_adapters(setup)
        model.active_head = "shared"
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits[row], logits[row])


def test_calls_that_are_not_served() -> None:
    model, batch = model_of(), batch_of("bert", rows=2)
    other = model_of()
    with pelt_fast.mixed_batch(model, ["lora", "prefix"]):
        for wanted in ("output_adapter_gating_scores", "output_adapter_fusion_attentions"):
            with pytest.raises(ValueError, match=f"{wanted} is set"):
                model(**batch, **{wanted: True})
        with pytest.raises(ValueError, match="another model was called"):
            other(**batch)


def test_prefixes_of_different_lengths_where_they_cannot_be_masked() -> None:
    model: Any = transformers.DebertaForSequenceClassification(
        transformers.DebertaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=32,
        )
    )  # fmt: skip
    adapters.init(model)
    model.add_adapter("long", config=CONFIGS["prefix"])
    model.add_adapter("short", config=CONFIGS["prefix"].replace(prefix_length=2))
    pelt_fast.accelerate(model)
    with pytest.raises(
        ValueError, match="prefixes of 2, 5 tokens in one layer of a model of type 'deb"
    ):
        pelt_fast.mixed_batch(model, ["long", "short"])
    model = model_of("t5", {"a": CONFIGS["prefix"], "b": CONFIGS["prefix"].replace(leave_out=[1])})
    with pytest.raises(ValueError, match="layers of a model of type 't5' share one bias"):
        pelt_fast.mixed_batch(model, ["a", "b"])
    model = model_of(
        "bert", {"a": CONFIGS["prefix"], "b": CONFIGS["prefix"].replace(leave_out=[1])}
    )
    batch = batch_of("bert", rows=3)
    setups = ["a", "b", None]
    assert_same(together(model, batch, setups), apart(model, batch, setups))


def test_a_checkpoint_that_is_not_the_models() -> None:
    model, batch = model_of().train(), batch_of("bert")
    with pelt_fast.mixed_batch(model, SETUPS):
        layers = model.bert.encoder.layer
        forward = layers[0].forward
        layers[0].forward = lambda *a, **k: checkpoint(forward, *a, use_reentrant=False, **k)
        logits = model(**batch).logits
    with pytest.raises(RuntimeError, match="use the model's own gradient_checkpointing_enable"):
        loss_of(logits).backward()


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_copies_and_restore(architecture: str) -> None:
    model, batch = model_of(architecture), batch_of(architecture)
    expected = together(model, batch)
    twin = copy.deepcopy(model)
    assert_same(together(twin, batch), expected)
    pelt_fast.restore(twin)
    assert not any(isinstance(module, Accelerated) for module in twin.modules())
    with pytest.raises(ValueError, match="not accelerated"):
        pelt_fast.mixed_batch(twin, SETUPS)


def test_gates_of_the_paper() -> None:
    model, batch = model_of(), batch_of("bert")
    library = together(model, batch)["logits"]
    pelt_fast.accelerate(model, compat="paper")
    expected = apart(model, batch)
    assert_same(together(model, batch), expected)
    assert not torch.allclose(expected["logits"], library)
