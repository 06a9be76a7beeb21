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

_ADAPTER = re.compile(r"(?P<path>.+)/adapters/(?P<part>weights1|biases1|weights2|biases2)(?::0)?")
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
    return any(_ADAPTER.fullmatch(key) for key in checkpoint.tensors)


def adapters(checkpoint: Checkpoint, name: str | None) -> dict[str, BottleneckAdapter]:
    """As ``load_bottleneck_adapters``."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        match = _ADAPTER.fullmatch(key)
        if match:
            state = found.setdefault(_dotted(match["path"]), {})
            state[_PARTS[match["part"]]] = _as_linear(tensor, match["part"])
    arguments = {"activation": "gelu_tanh", "init_weights": "houlsby"}
    return {path: build(checkpoint.origin, path, state, arguments) for path, state in found.items()}


def others(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The layernorms, and the head as ``BertForSequenceClassification`` names it."""
    found = {}
    for key, tensor in checkpoint.tensors.items():
        if match := _LAYER_NORM.fullmatch(key):
            found[f"{_dotted(match['path'])}.LayerNorm.{_RENAMED[match['part']]}"] = tensor
        elif match := _HEAD.fullmatch(key):
            found[f"classifier.{_RENAMED[match['part']]}"] = tensor
    return found


def _dotted(path: str) -> str:
    """bert/encoder/layer_3/output -> bert.encoder.layer.3.output."""
    return re.sub(r"\blayer_(\d+)\b", r"layer.\1", path.replace("/", "."))


def _as_linear(tensor: Tensor, part: str) -> Tensor:
    """Weights (in, out) to (out, in), biases (1, out) to (out,)."""
    if part.startswith("weights"):
        return tensor.T.contiguous() if tensor.dim() == 2 else tensor
    return tensor.squeeze(0) if tensor.dim() == 2 else tensor
