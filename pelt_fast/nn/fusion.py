"""``AdapterFusion``: the attention of the `adapters` library over several bottleneck adapters, in one fused call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional.checks import check_probability, number
from ..functional.fusion_fold import Attention
from .adapter import BottleneckAdapter
from .fusion_block import FusionSpec, fusion_block

_START, _STEP = 50.0, 0.05  # of the temperature


class AdapterFusion(nn.Module):
    """An attention over N ``BottleneckAdapter`` at one place of a model, as ``adapters`` 1.3.0 computes it.

    ``state_dict`` has the keys of the library's ``BertFusion`` (``query.weight``, ``query.bias``, ``key.weight``,
    ``key.bias``, ``value.weight``). The adapters are not its own: they are given to each call. Of an adapter the fusion
    takes what its up projection gives, times its scaling; of the last one the flags of what is around it. For a second
    stage of training freeze the adapters: nothing is computed for what needs no gradient.

    Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (2021).

    Args:
        input_size: d, the last size of the hidden states.
        query: whether there is a matrix for the query; without it the query is what the adapters get.
        key: likewise for what the adapters give, as keys.
        value: likewise as values, without a bias.
        value_initialized: the value matrix begins as the identity plus 1e-6, as in the library.
        query_before_ln: the query is the sub-layer's output, and not what the adapters get.
        residual_before: the residual is added to what each adapter gives, and not to the context.
        temperature: what scores are divided by begins at 50 and falls by 0.05 with every call, down to 1.
        dropout: probability in [0, 1] that a score is set to zero in training.
    """

    def __init__(
        self,
        input_size: int,
        *,
        query: bool = True,
        key: bool = True,
        value: bool = True,
        value_initialized: bool = True,
        query_before_ln: bool = False,
        residual_before: bool = False,
        temperature: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(input_size, int) or isinstance(input_size, bool) or input_size < 1:
            raise ValueError(f"input_size is {input_size!r}; expected a whole number of at least 1")
        self.input_size = input_size
        self.value_initialized = value_initialized
        self.query_before_ln, self.residual_before = query_before_ln, residual_before
        self.dropout = number("dropout", dropout)
        check_probability("dropout", self.dropout)
        self.T = _START if temperature else 1.0
        self.query = nn.Linear(input_size, input_size) if query else None
        self.key = nn.Linear(input_size, input_size) if key else None
        self.value = nn.Linear(input_size, input_size, bias=False) if value else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) and biases of zero, as in the library; the value as ``value_initialized`` says."""
        with torch.no_grad():
            for linear in (self.query, self.key, self.value):
                if linear is not None:
                    linear.weight.normal_(std=0.02)
                    if linear.bias is not None:
                        linear.bias.zero_()
            if self.value is not None and self.value_initialized:
                self.value.weight.fill_(1e-6)
                self.value.weight.fill_diagonal_(1.0)

    def forward(
        self,
        adapters: Sequence[BottleneckAdapter],
        hidden_states: Tensor,
        input_tensor: Tensor | None = None,
        layer_norm: nn.Module | None = None,
        *,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The sub-layer's end: adapters, attention, residuals and the model's layernorm.

        Args:
            adapters: N of them, with one activation that kernels know, without ``ln_before`` and stochastic depth.
            hidden_states: (..., d), the sub-layer's output.
            input_tensor: (..., d), the residual stream before the sub-layer, as ``BottleneckAdapter`` needs it.
            layer_norm: the model's norm behind the sub-layer, or None.
            output_attentions: whether the attention is wanted too.

        Returns:
            (..., d), and with ``output_attentions`` the attention (..., N), which carries no gradient.

        Raises:
            ValueError: adapters do not go together; or flags ask for an input_tensor or a layer_norm that is None.
        """
        spec = self._spec(adapters)
        y, p = fusion_block(spec, hidden_states, input_tensor, layer_norm, self.training)
        self.T = max(self.T - _STEP, 1.0) if self.T != 1.0 else 1.0
        return (y, p) if output_attentions else y

    def _spec(self, adapters: Sequence[BottleneckAdapter]) -> FusionSpec:
        if not isinstance(adapters, (list, tuple, nn.ModuleList)) or not len(adapters):
            raise ValueError(f"adapters is {adapters!r}; expected a sequence of BottleneckAdapter")
        specs = []
        for i, adapter in enumerate(adapters):
            if not isinstance(adapter, BottleneckAdapter):
                kind = type(adapter).__name__
                raise TypeError(f"adapters[{i}] is a {kind}; expected a BottleneckAdapter")
            spec = adapter.spec()
            if spec.norm_before is not None or (self.training and spec.stochastic_depth > 0.0):
                what = "ln_before" if spec.norm_before is not None else "stochastic_depth"
                raise ValueError(f"adapters[{i}] has {what}; expected adapters without it")
            if spec.activation != adapters[0].spec().activation or callable(spec.activation):
                raise ValueError(
                    f"adapters[{i}] has the activation {spec.activation!r}; expected one name for all adapters"
                )
            specs.append(spec)
        last = specs[-1]
        return FusionSpec(
            down_weights=[spec.down_weight for spec in specs],
            down_biases=[spec.down_bias for spec in specs],
            up_weights=[spec.up_weight for spec in specs],
            up_biases=[spec.up_bias for spec in specs],
            scaling=[spec.scaling for spec in specs],
            activation=str(last.activation),
            attention=Attention(
                *_parts(self.query),
                *_parts(self.key),
                None if self.value is None else self.value.weight,
            ),
            temperature=self.T,
            dropout=self.dropout,
            query_before_ln=self.query_before_ln,
            residual_before=self.residual_before,
            is_parallel=last.is_parallel,
            original_ln_before=last.original_ln_before,
            original_ln_after=last.original_ln_after,
            residual_before_ln=last.residual_before_ln,
        )

    def extra_repr(self) -> str:
        """What is no submodule."""
        flags = ("query_before_ln", "residual_before", "dropout", "T")
        return ", ".join(
            [f"input_size={self.input_size}", *(f"{f}={getattr(self, f)}" for f in flags)]
        )


def _parts(linear: nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if linear is None else (linear.weight, linear.bias)
