"""Layers of the base model in an accelerated model: its dropouts and the linear layers that have no LoRA."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import adapters
import pytest
import torch
from torch import Tensor, nn

import pelt_fast
from pelt_fast.integrations import base_layers as integration
from pelt_fast.integrations import deferred

from .adapters_models import HOULSBY, plain_model, randomize

METHODS = {
    "bottleneck": HOULSBY,
    "lora": adapters.LoRAConfig(dropout=0.0),
    "prefix": adapters.PrefixTuningConfig(flat=True),
}


def dropping(config: Any, architecture: str = "bert") -> nn.Module:
    """A model in training whose own dropouts act, and no other."""
    model = plain_model(architecture)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    randomize(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__module__.startswith(("transformers.", "adapters.models.")):
            for child in module.children():
                if type(child) is nn.Dropout:
                    child.p = 0.2
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.2
    return model.train()


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    ids = torch.arange(24).view(2, 12)
    torch.manual_seed(4)
    y = model(input_ids=ids)[0]
    model.zero_grad()
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients, torch.rand(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_what_it_gives_the_library(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dropping(METHODS[method])
    ours = copy.deepcopy(model)
    pelt_fast.accelerate(ours)
    calls: list[str] = []
    for module, name in ((integration, "dropout"), (deferred, "attention")):
        theirs = getattr(module, name)

        def counted(*args: Any, _theirs: Any = theirs, _name: str = name, **kwargs: Any) -> Tensor:
            calls.append(_name)
            return _theirs(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    expected, got = step(model), step(ours)
    torch.testing.assert_close(got, expected)
    layers = model.config.num_hidden_layers
    assert calls.count("attention") == layers
    assert calls.count("dropout") == 2 * layers + 1  # and the embeddings'
    calls.clear()
    with torch.no_grad():
        model.eval(), ours.eval()
        torch.testing.assert_close(
            *(m(input_ids=torch.arange(24).view(2, 12))[0] for m in (ours, model))
        )
    assert "attention" not in calls


def test_which_layers_and_back() -> None:
    model = dropping(HOULSBY)
    before = {name: type(module) for name, module in model.named_modules()}
    report = pelt_fast.accelerate(model)
    fast = {n: m for n, m in model.named_modules() if type(m) is not before[n]}
    assert type(fast["bert.encoder.layer.0.attention.output.dense"]).__name__ == "AcceleratedLinear"
    kinds = {n for n, m in fast.items() if isinstance(m, integration.FastDropout)}
    assert {"bert.embeddings.dropout", "bert.encoder.layer.1.output.dropout"} <= kinds
    assert not any(".adapters." in name for name in kinds)  # an adapter's own
    assert not kinds & {*report.replaced, *report.left}
    assert report.fast == {"bottleneck layer": 4}
    # all that the library wraps, two before its adapters and the pooler
    assert report.base == {"frozen linear": 2 * 5 + 2 + 1, "dropout": 7, "attention layer": 2}
    for name in ("bert.embeddings.dropout", "bert.encoder.layer.0.attention.output.dense"):
        assert type(pickle.loads(pickle.dumps(fast[name]))) is type(fast[name])
    pelt_fast.restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_settings_are_read_at_each_call() -> None:
    model = dropping(HOULSBY)
    pelt_fast.accelerate(model)
    layer: Any = model.get_submodule("bert.embeddings.dropout")
    x = torch.randn(4, 8)
    layer.p = 0.0
    assert torch.equal(layer(x), x)
    layer.p, layer.inplace = 0.5, True
    y = x.clone()
    assert layer(y) is y
    assert bool((y == 0).any())
    layer.eval()
    assert layer(x) is x


def test_frozen_linear_layer_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dropping(HOULSBY)
    pelt_fast.accelerate(model)
    seen: list[torch.Size] = []
    theirs = integration.frozen_linear
    monkeypatch.setattr(
        integration, "frozen_linear", lambda x, w, b: (seen.append(w.shape), theirs(x, w, b))[1]
    )
    step(model)
    size = model.config.hidden_size
    assert seen == [(size, size)] * (model.config.num_hidden_layers + 1)  # and the pooler
