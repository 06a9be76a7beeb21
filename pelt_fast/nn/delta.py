"""``DiffPruningLinear`` and ``MaskedLinear``: frozen linears of which every weight has a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..functional.delta import STRETCH

_OPEN = 5.0  # gates start open, with probability 0.99 and more


class DiffPruningLinear(nn.Module):
    """A frozen linear plus a sparse difference that is learned (Guo et al., 2021): (W + z ⊙ diff) x, and so the bias.

    The loss gets ``factor * pelt_fast.nn.diff_pruning_penalty(model)``, the number of entries that are expected to
    differ, which a training forward makes in the pass that makes the weight. Gates are noisy in training and fixed in
    eval. ``merged`` gives the plain linear for serving.

    Parameters: ``base_layer.{weight,bias}`` (frozen), ``diff`` and ``log_alpha`` (out, in), with a bias ``bias_diff``
    and ``bias_log_alpha`` (out,), with ``structured`` ``group_log_alpha`` and ``bias_group_log_alpha`` (1,).

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is one; it gets gates of its own.
        structured: one more gate for the whole weight, and one for the bias.
        stretch: what gates are stretched to before they are cut to [0, 1]; lower < 0 and upper > 1.
        device: where the parameters live.
        dtype: of the frozen weight.
        delta_dtype: of what is trained; None: as ``dtype``. ``torch.float32`` over a half-precision weight is allowed.
    """

    diff: nn.Parameter
    log_alpha: nn.Parameter
    bias_diff: nn.Parameter | None
    bias_log_alpha: nn.Parameter | None
    group_log_alpha: nn.Parameter | None
    bias_group_log_alpha: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        structured: bool = False,
        stretch: tuple[float, float] = STRETCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        delta_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init(linear, structured, stretch, delta_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        structured: bool = False,
        stretch: tuple[float, float] = STRETCH,
        delta_dtype: torch.dtype | None = None,
    ) -> DiffPruningLinear:
        """Wraps an existing linear, sharing and freezing its parameters; keywords as the class's."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init(linear, structured, stretch, delta_dtype)
        return layer

    def _init(
        self,
        linear: nn.Linear,
        structured: bool,
        stretch: tuple[float, float],
        dtype: torch.dtype | None,
    ) -> None:
        self.base_layer = _frozen(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stretch = stretch
        self.penalty: Tensor | None = None
        """Of the last forward in training, with its graph; gone from copies."""
        for prefix, frozen in (("", linear.weight), ("bias_", linear.bias)):
            none = frozen is None
            like: dict[str, Any] = (
                {} if none else {"device": frozen.device, "dtype": dtype or frozen.dtype}
            )
            diff = None if none else nn.Parameter(torch.zeros(frozen.shape, **like))
            gates = None if none else nn.Parameter(torch.full(frozen.shape, _OPEN, **like))
            group = nn.Parameter(torch.full((1,), _OPEN, **like)) if structured and like else None
            self.register_parameter(f"{prefix}diff", diff)
            self.register_parameter(f"{prefix}log_alpha", gates)
            self.register_parameter(f"{prefix}group_log_alpha", group)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        bias, of_bias = self._bias(self.training)
        y, count = functional.diff_pruning_linear(
            x,
            self.base_layer.weight,
            bias,
            self.diff,
            self.log_alpha,
            group_log_alpha=self.group_log_alpha,
            stretch=self.stretch,
            training=self.training,
        )
        if self.training:
            self.penalty = count if of_bias is None else count + of_bias
        return y

    def _bias(self, training: bool) -> tuple[Tensor | None, Tensor | None]:
        if self.bias_diff is None or self.bias_log_alpha is None:
            return None, None
        return functional.diff_pruning_weight(
            self.base_layer.bias,
            self.bias_diff,
            self.bias_log_alpha,
            group_log_alpha=self.bias_group_log_alpha,
            stretch=self.stretch,
            training=training,
        )

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear with the gates as in eval."""
        weight, _ = functional.diff_pruning_weight(
            self.base_layer.weight,
            self.diff,
            self.log_alpha,
            group_log_alpha=self.group_log_alpha,
            stretch=self.stretch,
        )
        return _linear(weight, self._bias(training=False)[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "penalty": None}

    def extra_repr(self) -> str:
        """Sizes, and whether there are gates for groups."""
        structured = self.group_log_alpha is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias_diff is not None}, structured={structured}, stretch={self.stretch}"
        )


def diff_pruning_penalty(model: nn.Module) -> Tensor:
    """How many entries of a model's ``DiffPruningLinear`` layers are expected to differ: the sum of their penalties.

    Each layer's is that of its last forward in training.

    Raises:
        ValueError: there is no such layer, or none has run in training.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, DiffPruningLinear)]
    found = [layer.penalty for layer in layers if layer.penalty is not None]
    if not found:
        raise ValueError(
            f"model has {len(layers)} DiffPruningLinear layers, of which none has run in training; expected one or more"
        )
    return torch.stack([penalty.to(found[0]) for penalty in found]).sum()


class MaskedLinear(nn.Module):
    """A frozen linear that loses the entries of its weight whose learned scores are below a threshold.

    As Zhao et al. (2020) tune by masking; gradients pass straight through the comparison.

    Parameters: ``base_layer.{weight,bias}`` (frozen) and ``scores`` (out, in), drawn uniformly around the threshold so
    that a share of ``init_sparsity`` of them lies below it. ``merged`` gives the plain linear for serving.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is one; it is frozen.
        threshold: what a score must reach for its weight to stay; not 0.
        init_sparsity: share of the weight that is masked at the start, 0 to 1.
        device: where the parameters live.
        dtype: of the frozen weight.
        score_dtype: of the scores; None: as ``dtype``. ``torch.float32`` over a half-precision weight is allowed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        threshold: float = 0.01,
        init_sparsity: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init(linear, threshold, init_sparsity, score_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        threshold: float = 0.01,
        init_sparsity: float = 0.05,
        score_dtype: torch.dtype | None = None,
    ) -> MaskedLinear:
        """Wraps an existing linear, sharing and freezing its parameters; keywords as the class's."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init(linear, threshold, init_sparsity, score_dtype)
        return layer

    def _init(
        self,
        linear: nn.Linear,
        threshold: float,
        init_sparsity: float,
        dtype: torch.dtype | None,
    ) -> None:
        for name, value in (("threshold", threshold), ("init_sparsity", init_sparsity)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} is a {type(value).__name__}; expected a number")
        if not 0.0 < abs(threshold) < float("inf"):
            raise ValueError(f"threshold is {threshold}; expected a finite number other than 0")
        if not 0.0 <= init_sparsity <= 1.0:
            raise ValueError(f"init_sparsity is {init_sparsity}; expected a share between 0 and 1")
        self.base_layer = _frozen(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold, self.init_sparsity = float(threshold), float(init_sparsity)
        weight = linear.weight
        self.scores = nn.Parameter(torch.empty_like(weight, dtype=dtype or weight.dtype))
        self.reset_scores()

    @torch.no_grad()
    def reset_scores(self) -> None:
        """Draws the scores again: twice the threshold wide, a share of ``init_sparsity`` below it."""
        width = 2 * abs(self.threshold)
        lowest = self.threshold - self.init_sparsity * width
        self.scores.uniform_(lowest, lowest + width)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        layer = self.base_layer
        return functional.masked_linear(
            x, layer.weight, layer.bias, self.scores, threshold=self.threshold
        )

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear with the masked weight."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        return _linear(torch.where(self.scores >= self.threshold, weight, 0.0), bias)

    def extra_repr(self) -> str:
        """Sizes and the threshold."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.base_layer.bias is not None}, threshold={self.threshold}"
        )


def _frozen(linear: Any) -> nn.Linear:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear is a {type(linear).__name__}; expected a torch.nn.Linear")
    return linear.requires_grad_(False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear of its own memory."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, "meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear
