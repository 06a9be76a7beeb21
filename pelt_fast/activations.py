"""The activations of a bottleneck adapter: their names, their values and their derivatives.

Names and forms are those of ``transformers.activations.ACT2FN``, which the ``adapters`` library reads its
``non_linearity`` from. Every kernel has each of them under the same canonical name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = (
    "relu",
    "gelu",  # with erf
    "gelu_tanh",
    "silu",
    "tanh",
    "sigmoid",
    "leaky_relu",  # slope 0.01 below zero
    "quick_gelu",
    "relu2",
    "relu6",
    "mish",
    "linear",
)
_ALIASES = {
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "swish": "silu",
    "leakyrelu": "leaky_relu",
    "identity": "linear",
}
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_QUICK = 1.702
_SLOPE = 0.01
_SELECTING = ("relu", "relu2", "relu6")


def activation_name(name: str) -> str:
    """The canonical name; raises ValueError for one that no kernel has."""
    found = name.lower()
    found = _ALIASES.get(found, found)
    if found not in ACTIVATIONS:
        known = ", ".join(map(repr, (*ACTIVATIONS, *_ALIASES)))
        raise ValueError(f"activation={name!r} is not known; expected a callable or one of {known}")
    return found


_CANONICAL: dict[Any, str] = {**{name: name for name in ACTIVATIONS}, **_ALIASES}


def canonical(activation: Any) -> str | None:
    """The canonical name of a name in lower case; None for anything else."""
    return _CANONICAL.get(activation) if type(activation) is str else None


def activate(q: Tensor, name: str) -> Tensor:
    """act(q), in q's dtype."""
    if name == "relu":
        return torch.relu(q)
    if name == "gelu":
        return F.gelu(q)
    if name == "gelu_tanh":
        return F.gelu(q, approximate="tanh")
    if name == "silu":
        return F.silu(q)
    if name == "tanh":
        return torch.tanh(q)
    if name == "sigmoid":
        return torch.sigmoid(q)
    if name == "leaky_relu":
        return F.leaky_relu(q, _SLOPE)
    if name == "quick_gelu":
        return q * torch.sigmoid(_QUICK * q)
    if name == "relu2":
        return torch.relu(q).square()
    if name == "relu6":
        return F.relu6(q)
    if name == "mish":
        return F.mish(q)
    return q


def derivative(q: Tensor, name: str) -> Tensor:
    """act'(q), in q's dtype, which should be wide: sums of several terms cancel here."""
    if name == "relu":
        return torch.where(q <= 0, 0.0, 1.0).to(q.dtype)  # of nan it is one, as torch has it
    if name == "gelu":
        density = torch.exp(-0.5 * q * q) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-q * math.sqrt(0.5)) + q * density
    if name == "gelu_tanh":
        t = torch.tanh(_TANH_SCALE * (q + _TANH_CUBE * q**3))
        inner = _TANH_SCALE * (1 + 3 * _TANH_CUBE * q * q)
        return 0.5 * (1 + t) + 0.5 * q * (1 - t * t) * inner
    if name in ("silu", "quick_gelu"):
        slope = _QUICK if name == "quick_gelu" else 1.0
        s = torch.sigmoid(slope * q)
        return s * (1 + slope * q * (1 - s))
    if name == "tanh":
        return 1 - torch.tanh(q).square()
    if name == "sigmoid":
        s = torch.sigmoid(q)
        return s * (1 - s)
    if name == "leaky_relu":
        return torch.where(q > 0, torch.ones_like(q), _SLOPE)  # of two numbers it would be fp32
    if name == "relu2":
        return 2 * torch.relu(q)
    if name == "relu6":
        return torch.where((q <= 0) | (q >= 6), 0.0, 1.0).to(q.dtype)
    if name == "mish":
        t = torch.tanh(F.softplus(q))
        return t + q * torch.sigmoid(q) * (1 - t * t)
    return torch.ones_like(q)


def activate_backward(da: Tensor, q: Tensor, name: str) -> Tensor:
    """da · act'(q); where torch selects instead of multiplying, nothing of an infinite da passes."""
    slope = derivative(q, name)
    through = da * slope
    return torch.where(slope == 0, 0.0, through) if name in _SELECTING else through
