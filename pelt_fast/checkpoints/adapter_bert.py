"""google-research/adapter-bert (Houlsby et al., 2019): TensorFlow variables.

In ``modeling.py``, with path ``bert/encoder/layer_{i}/attention/output`` or ``bert/encoder/layer_{i}/output``:

    {path}/adapters/weights1 (d, m), biases1 (1, m), weights2 (m, d), biases2 (1, d)
    {path}/LayerNorm/gamma, beta (d,)          trained, too, and so is bert/embeddings/LayerNorm

    y = LN(o + gelu(o weights1 + biases1) weights2 + biases2 + x), gelu in its tanh form

``optimization.py`` trains the adapters, the layernorms and the head (output_weights, output_bias).
"""

from __future__ import annotations

import re

from torch import Tensor

from ..nn import BottleneckAdapter
from .build import build
from .source import Checkpoint

_ADAPTER = re.compile(r"(?P<path>.+)/adapters/(?P<part>[^/:]+)(?::0)?")
_LAYER_NORM = re.compile(r"(?P<path>.+)/LayerNorm/(?P<part>gamma|beta)(?::0)?")
_HEAD = re.compile(r"(?:.+/)?output_(?P<part>weights|bias)(?::0)?")
_PARTS = {
    "weights1": "adapter_down.0.weight",
    "biases1": "adapter_down.0.bias",
    "weights2": "adapter_up.weight",
    "biases2": "adapter_up.bias",
}
_RENAMED = {"gamma": "weight", "beta": "bias", "weights": "weight", "bias": "bias"}


def holds_adapters(checkpoint: Checkpoint) -> bool:
    """Whether keys are adapter-bert's."""
    matches = map(_ADAPTER.fullmatch, checkpoint.values)
    return any(match["part"] in _PARTS for match in matches if match)


def adapters(checkpoint: Checkpoint, name: str | None) -> dict[str, BottleneckAdapter]:
    """As ``load_bottleneck_adapters``."""
    found: dict[str, dict[str, str]] = {}
    for key in checkpoint.values:
        match = _ADAPTER.fullmatch(key)
        if match:
            keys = found.setdefault(_dotted(match["path"]), {})
            checkpoint.claim(keys, _PARTS.get(match["part"], match["part"]), key)
    arguments = {"activation": "gelu_tanh", "init_weights": "houlsby"}
    layers = {}
    for path, keys in found.items():
        if not keys.keys().isdisjoint(_PARTS.values()):
            state = {name: _as_linear(checkpoint.tensor(key), name) for name, key in keys.items()}
            layers[path] = build(checkpoint, path, state, arguments)
    return layers


def others(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The layernorms, and the head as ``BertForSequenceClassification`` names it."""
    keys: dict[str, str] = {}
    for key in checkpoint.values:
        if match := _LAYER_NORM.fullmatch(key):
            name = f"{_dotted(match['path'])}.LayerNorm.{_RENAMED[match['part']]}"
            checkpoint.claim(keys, name, key)
        elif match := _HEAD.fullmatch(key):
            checkpoint.claim(keys, f"classifier.{_RENAMED[match['part']]}", key)
    return {name: checkpoint.tensor(key) for name, key in keys.items()}


def _dotted(path: str) -> str:
    """bert/encoder/layer_3/output -> bert.encoder.layer.3.output."""
    return re.sub(r"\blayer_(\d+)\b", r"layer.\1", path.replace("/", "."))


def _as_linear(tensor: Tensor, name: str) -> Tensor:
    """Weights (in, out) to (out, in), biases (1, out) to (out,)."""
    if tensor.dim() != 2:
        return tensor
    return tensor.T if name.endswith("weight") else tensor.squeeze(0)
