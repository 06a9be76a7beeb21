"""Prefix tuning as a layer: keys and values in front of those of every attention layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..functional import prefix_gate
from .kept import keep

_COMPATS = ("adapters", "paper")


class PrefixTuning(nn.Module):
    """Keys and values of a prefix for each layer of a model, of an MLP (Li and Liang 2021) or flat.

    ``control_trans(wte.weight)`` is computed once for all samples, and not at all while its parameters do not change
    and need no gradient. Parameters and their names are those of ``PrefixTuning`` and ``FlatPrefixTuning`` in
    `adapters`, so that ``state_dict`` goes from one to the other.

    Args:
        layers: attention layers that get a prefix.
        heads: of the keys and values.
        head_dim: features of a head.
        prefix_length: tokens.
        hidden_size: of the embeddings; None: heads · head_dim.
        bottleneck: width of the MLP.
        activation: of the MLP; a callable.
        flat: the keys and values themselves are the parameter; there is no MLP.
        dropout_p: of keys and values, in training.

    Shapes:
        ``forward(batch_size)`` -> for each layer (2, B, heads, prefix_length, head_dim), keys and values: one prefix
        expanded to the batch, unless dropout acts.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        prefix_length: int = 30,
        *,
        hidden_size: int | None = None,
        bottleneck: int = 512,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        flat: bool = False,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "layers": layers,
            "heads": heads,
            "head_dim": head_dim,
            "prefix_length": prefix_length,
            "bottleneck": bottleneck,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}; expected an int of at least 1")
        self.layers, self.heads, self.head_dim = layers, heads, head_dim
        self.prefix_length = prefix_length
        hidden_size = hidden_size or heads * head_dim
        features = layers * 2 * heads * head_dim
        self.dropout = nn.Dropout(dropout_p)
        if flat:
            flat_prefix = torch.randn(prefix_length * features, device=device, dtype=dtype)
            self.control_trans: nn.Module | nn.Parameter = nn.Parameter(flat_prefix)
            return
        self.wte = nn.Embedding(prefix_length, hidden_size, device=device, dtype=dtype)
        self.control_trans = nn.Sequential(
            nn.Linear(hidden_size, bottleneck, device=device, dtype=dtype),
            _Function(activation),
            nn.Linear(bottleneck, features, device=device, dtype=dtype),
        )

    @property
    def flat(self) -> bool:
        """Whether the keys and values themselves are the parameter."""
        return isinstance(self.control_trans, nn.Parameter)

    def forward(self, batch_size: int) -> tuple[Tensor, ...]:
        """Of each layer: (2, batch_size, heads, prefix_length, head_dim)."""
        drops = self.dropout.training and self.dropout.p > 0
        return for_batch(self._states(), batch_size, self.dropout if drops else None)

    def _states(self) -> tuple[Tensor, ...]:
        shape = (self.prefix_length, self.layers * 2, self.heads, self.head_dim)
        if isinstance(self.control_trans, nn.Parameter):
            return by_layer(self.control_trans, shape)
        mlp, tokens = self.control_trans, self.wte.weight
        parameters = (tokens, *mlp.parameters())
        return keep(self, parameters, lambda: by_layer(mlp(tokens), shape))

    @torch.no_grad()
    def eject(self) -> PrefixTuning:
        """The same prefix without its MLP, flat; what is saved in the end."""
        flat = PrefixTuning(
            self.layers,
            self.heads,
            self.head_dim,
            self.prefix_length,
            flat=True,
            dropout_p=self.dropout.p,
        )
        prefix = torch.cat(self._states()).squeeze(1).permute(2, 0, 1, 3)
        flat.control_trans = nn.Parameter(
            prefix.clone(memory_format=torch.contiguous_format).view(-1)
        )
        return flat.train(self.training)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        form = ", flat" if self.flat else ""
        return f"layers={self.layers}, heads={self.heads}, head_dim={self.head_dim}{form}"


class PrefixGate(nn.Module):
    """The gate of a prefix (UniPELT, Mao et al. 2022): for each sample the mean over its tokens of σ(x weightᵀ + bias).

    Args:
        hidden_size: of the attention's input.
        shared: one gate for keys and values; else one for each.
        compat: "adapters": the mean is over all tokens, padding included, as in `adapters` and in UniPELT's own code;
            "paper": over the real ones.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        shared: bool = True,
        compat: str = "adapters",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if compat not in _COMPATS:
            raise ValueError(f"compat is {compat!r}; expected 'adapters' or 'paper'")
        self.compat = compat
        self.gate = nn.Linear(hidden_size, 1 if shared else 2, device=device, dtype=dtype)
        nn.init.normal_(self.gate.weight, std=0.02)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """x (B, T, hidden_size), attention_mask (B, T) -> (B, 1), or (B, 2) where it is not shared."""
        mask = attention_mask if self.compat == "paper" else None
        return prefix_gate(x, self.gate.weight, self.gate.bias, attention_mask=mask)


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def by_layer(key_values: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """The result of an MLP (P, layers · 2 · H · D), or a flat prefix, as (2, 1, H, P, D) for each layer."""
    states = key_values.view(1, *shape).permute(2, 0, 3, 1, 4)
    # where it stays, a layer had better find its own together
    return (states if states.requires_grad else states.contiguous()).split(2)


def for_batch(
    states: tuple[Tensor, ...], batch_size: int, dropout: nn.Module | None = None
) -> tuple[Tensor, ...]:
    """(2, 1, H, P, D) for each layer -> (2, B, H, P, D); dropout draws a mask for every sample."""
    if dropout is not None:
        # in the order in which `adapters` draws: the same seed gives the same mask
        sample = torch.cat(states).permute(1, 3, 0, 2, 4).contiguous()
        return dropout(sample.expand(batch_size, -1, -1, -1, -1)).permute(2, 0, 3, 1, 4).split(2)
    if batch_size == 1:
        return states
    return tuple([part.expand(-1, batch_size, -1, -1, -1) for part in states])
