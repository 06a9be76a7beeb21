"""Real transformers models, tiny; with LoRA by PEFT, whose B is random, as a zero B makes dA zero.

``adapters_models.py`` puts bottleneck adapters into the same models.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import torch
import transformers
from torch import Tensor, nn

import pelt_fast
from pelt_fast.integrations import peft as integration

from .parity import assert_equal_but_for_rounding, rounding_of

VOCABULARY = 61


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.RobertaForMaskedLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        # a ReLU's gradient jumps where rounding changes a sign: no bound holds there
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def _qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return transformers.Qwen2ForCausalLM(config)


@dataclass(frozen=True)
class Architecture:
    """How to build a model, where its LoRA goes, and how many of its layers that makes."""

    name: str
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    layers: int
    classes: int | None = (
        None  # a classifier has one label for each row, the others one for each token
    )

    def batch(self, rows: int = 3, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        labels = ids.clone()
        if self.classes is not None:
            labels = torch.randint(self.classes, (rows,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("bert", _bert, ("query", "key", "value", "dense"), 13, classes=2),
        Architecture("roberta", _roberta, ("query", "value", "output.dense"), 8),
        Architecture("t5", _t5, ("q", "k", "v", "o", "wi_0", "wi_1", "wo"), 36),
        Architecture("gpt2", _gpt2, ("c_attn", "c_proj", "c_fc"), 8),
        Architecture(
            "llama",
            _llama,
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            14,
        ),
        Architecture("qwen2", _qwen2, ("q_proj", "v_proj"), 4),
    )
}


def randomize_lora(model: nn.Module, seed: int = 1) -> None:
    """Draws every LoRA matrix anew, so large that an adapter adds about as much as its base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                std = (1.0 if ".lora_A." in name else 0.1) / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.fixture(scope="session")
def rounding() -> Callable[[torch.dtype, int], float]:
    return rounding_of


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """assert_same(actual, expected): equal but for the order of sums."""
    return assert_equal_but_for_rounding


Make = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def architectures() -> dict[str, Architecture]:
    return ARCHITECTURES


@pytest.fixture(scope="session")
def randomize() -> Callable[..., None]:
    return randomize_lora


@pytest.fixture
def make() -> Make:
    """make(architecture, dtype, **LoraConfig arguments) -> a model, equal for equal arguments."""

    def make(
        architecture: str = "bert",
        dtype: torch.dtype = torch.float32,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> nn.Module:
        arch = ARCHITECTURES[architecture]
        torch.manual_seed(0)
        model = arch.build().to(dtype)
        model.config.use_cache = (
            False  # a cache is off under checkpointing, and T5 rounds otherwise
        )
        options = {"r": 4, "lora_alpha": 6, "target_modules": list(arch.targets), **options}
        if architecture == "gpt2":
            options.setdefault("fan_in_fan_out", True)
        config = peft.LoraConfig(**options)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        randomize_lora(model)
        return model

    return make


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the calls that accelerated layers have served themselves so far."""
    inputs: list[Tensor] = []
    original = integration.lora_linear

    def spy(x: Tensor, **operands: Any) -> Tensor:
        inputs.append(x)
        return original(x, **operands)

    monkeypatch.setattr(integration, "lora_linear", spy)
    return inputs


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that accelerated bottleneck layers have served themselves so far: "block" or "core"."""
    from pelt_fast.integrations import adapters_bottleneck as integration

    calls: list[str] = []
    for kind in ("block", "core"):
        original = getattr(integration, f"bottleneck_{kind}")

        def spy(*args: Any, _original: Any = original, _kind: str = kind, **kwargs: Any) -> Tensor:
            calls.append(_kind)
            return _original(*args, **kwargs)

        monkeypatch.setattr(integration, f"bottleneck_{kind}", spy)
    return calls


@pytest.fixture
def accelerated() -> Callable[[nn.Module], nn.Module]:
    """An accelerated copy of a model."""

    def accelerated(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        pelt_fast.accelerate(model)
        return model

    return accelerated


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # PEFT and adapters call what transformers has deprecated
    mark = pytest.mark.filterwarnings(
        "ignore::FutureWarning:transformers.*",
        "ignore:.past_key_value. is deprecated:FutureWarning:torch.*",
    )
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
