"""UniPELT's central gate as a layer: one for all submodules of a transformer layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import central_gate

_COMPATS = ("unipelt", "paper")


class CentralGate(nn.Module):
    """For each sample a factor of each submodule: softmax of the mean over its tokens of relu(x weightᵀ + bias).

    The central gate of UniPELT's own code (Mao et al. 2022), one of them in each layer. Column k of the result goes to
    its submodule as ``docs/unipelt.md`` shows: to LoRA as ``row_scale`` of ``functional.multi_lora``, to an adapter as
    ``gate`` of ``functional.bottleneck_adapter``, to a prefix as ``gate`` of ``functional.prefix_attention``.

    Args:
        hidden_size: of the layer's input.
        submodules: how many share the gate.
        compat: "unipelt": the mean is over all tokens, padding included, as in UniPELT's own code; "paper": over the
            real ones, which needs the attention mask.
    """

    def __init__(
        self,
        hidden_size: int,
        submodules: int = 3,
        *,
        compat: str = "unipelt",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if compat not in _COMPATS:
            raise ValueError(f"compat is {compat!r}; expected 'unipelt' or 'paper'")
        self.compat = compat
        self.gate = nn.Linear(hidden_size, submodules, device=device, dtype=dtype)
        nn.init.normal_(self.gate.weight, std=0.02)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """x (B, T, hidden_size), attention_mask (B, T) -> (B, submodules), rows that sum to 1."""
        if self.compat == "paper" and attention_mask is None:
            raise ValueError(
                "attention_mask is None; expected (B, T), since compat is 'paper': the mean is over real tokens"
            )
        mask = attention_mask if self.compat == "paper" else None
        return central_gate(x, self.gate.weight, self.gate.bias, attention_mask=mask)
