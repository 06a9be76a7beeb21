"""A mixed batch on an attention layer of the `adapters` library: prefixes of several lengths, and none, in one call.

Every sample's prefix stands directly in front of its keys; to the left of the shorter ones there is padding, which the
mask excludes. Attention with a bias by column (T5) sees each sample's columns begin at the left instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from adapters.methods.prefix_tuning import PrefixTuningLayer, PrefixTuningState
from torch import Tensor, nn

from .adapters_mixed import Alone, Groups, MixedBatch
from .adapters_paper import tokens_of

BY_COLUMN = ("t5", "mt5")
"""Model types whose attention has a bias for the distance of two columns."""
MODELS = (
    *("bert", "roberta", "xlm-roberta", "electra", "distilbert", "gpt2", "llama", "mistral"),
    *BY_COLUMN,
)
"""Model types in which prefixes of different lengths go in one batch."""


def mixed_prefix(layer: Any, batch: MixedBatch, state: PrefixTuningState) -> PrefixTuningState:
    """``state`` with each sample's prefix, gated, in front of its keys and values, and their mask.

    Args:
        layer: the accelerated layer.
        batch: what is active on it.
        state: keys and values (B, H, S, D), the attention's input (B, L, d), mask or None.
    """
    groups = batch.groups(layer, state.key_states)
    if len(groups.setups) == 1:
        with Alone(groups.setups[0]):
            keys, values, mask = layer.forward(*state[:5])
        return state._replace(key_states=keys, value_states=values, attention_mask=mask)
    gated = any(name in layer.prefix_gates for name in batch.flatten())
    # a residual of no features where nobody reads it
    residual = state.residual_input if gated else state.residual_input[..., :0]
    parts = zip(groups.setups, groups.samples, _rows(groups), groups.apart(residual), strict=True)
    prefixes = [_prefix(layer, state, *part) for part in parts]
    lengths = [keys.shape[2] for keys, _ in prefixes]
    longest = max(lengths)
    keys, values = (
        groups.together([F.pad(p, (0, 0, longest - p.shape[2], 0)) for p in parts])
        for parts in zip(*prefixes, strict=True)
    )
    keys = torch.cat([keys, state.key_states], 2)
    values = torch.cat([values, state.value_states], 2)
    absent = torch.tensor(
        [longest - lengths[group] for group in groups.of_sample], device=keys.device
    )
    mask = _mask(layer, batch, state, absent, longest, min(lengths) == longest)
    if min(lengths) < longest and by_column(layer.model_config):
        keys, values, mask = _aligned(absent, keys, values, mask)
    return state._replace(key_states=keys, value_states=values, attention_mask=mask)


def prefix_length(layer: PrefixTuningLayer, setup: Any) -> int:
    """How many keys a setup puts in front of a sample's on this layer."""
    if setup is None or layer.layer_idx in (layer.adapters_config.skip_layers or ()):
        return 0
    pool: Any = layer.pool
    names = [name for name in _in_order(setup) if name in layer.prefixes]
    return sum(pool.prefix_tunings[name][layer.location_key].config.prefix_length for name in names)


def by_column(config: Any) -> bool:
    """Whether attention depends on the distance of columns."""
    return config.model_type in BY_COLUMN or getattr(
        config, "position_embedding_type", "absolute"
    ) in ("relative_key", "relative_key_query")


def _in_order(setup: Any) -> list[str]:
    return [setup] if isinstance(setup, str) else [n for child in setup for n in _in_order(child)]


def _rows(groups: Groups) -> list[Any]:
    """The samples of each group, as an index into the batch."""
    if groups.order is not None:
        return list(groups.order.split(groups.sizes))
    ends = torch.tensor(groups.sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, groups.sizes, strict=True)]


def _prefix(
    layer: Any, state: PrefixTuningState, setup: Any, samples: Any, rows: Any, residual: Any
) -> tuple[Tensor, Tensor]:
    """Keys and values (n, H, P, D) of one setup's prefix for its samples: in front of nothing."""
    _, heads, _, features = state.key_states.shape
    nothing = state.key_states.new_zeros(len(residual), heads, 0, features)
    if setup is None:
        return nothing, nothing
    own = PrefixTuningState(nothing, nothing, residual, None, state.invert_mask, rows)
    with Alone(setup), tokens_of(samples):
        own = layer.compose(setup, own)
    return own.key_states, own.value_states


def _mask(
    layer: Any,
    batch: MixedBatch,
    state: PrefixTuningState,
    absent: Tensor,
    longest: int,
    equal: bool,
) -> Tensor | None:
    """The mask with columns for the prefixes, of which ``absent`` (B,) are padding."""
    mask, keys = state.attention_mask, state.key_states
    if mask is None:
        return None if equal else _made(layer, batch, state, absent, longest)
    allowed = float(not state.invert_mask)  # as the library has it, in a boolean mask too
    columns = torch.arange(longest, device=keys.device)
    padding = columns < absent[:, None]  # (B, P)
    if mask.dim() == 4:
        mask = mask.expand(len(keys), -1, -1, -1)
        padding = padding[:, None, None].expand(*mask.shape[:3], -1)
    front = mask.new_full(padding.shape, allowed)
    # a mask of two dimensions says 0 where it excludes, and all others are added
    excluded = float("-inf") if mask.is_floating_point() and mask.dim() == 4 else 0
    return torch.cat([front.masked_fill(padding, excluded), mask], -1)


def _made(
    layer: Any, batch: MixedBatch, state: PrefixTuningState, absent: Tensor, longest: int
) -> Tensor:
    """(B, 1, L or 1, P + S): what attention does without a mask, and no padding.

    Without a mask causal attention excludes a key behind the query's number: the library counts from the first of the
    prefix, and what a sample gets alone it gets here.
    """
    keys, queries = state.key_states, state.residual_input.shape[1]
    columns = torch.arange(longest + keys.shape[2], device=keys.device)
    place = columns - absent[:, None]  # (B, P + S): of a key among the sample's own
    excluded = (place < 0)[:, None]
    if queries > 1 and _is_causal(layer, batch.attentions[layer]):
        behind = torch.arange(queries, device=keys.device)[:, None]
        excluded = excluded | (place[:, None] > behind)
    return keys.new_zeros(excluded.shape).masked_fill(excluded, float("-inf"))[:, None]


def _is_causal(layer: Any, attention: nn.Module) -> bool:
    """Whether attention that is given no mask makes a causal one of its own."""
    if layer.model_config._attn_implementation != "sdpa" or layer.location_key.startswith("cross"):
        return False
    flag = getattr(attention, "is_causal", None)
    return bool(getattr(attention, "is_decoder", False) if flag is None else flag)


class _Aligned(NamedTuple):
    keys: Tensor
    values: Tensor
    mask: Tensor | None


def _aligned(absent: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> _Aligned:
    """Each sample's columns begin at the left, and the padding is behind them."""
    columns = (torch.arange(keys.shape[2], device=keys.device) + absent[:, None]) % keys.shape[2]

    def gathered(t: Tensor, dim: int) -> Tensor:
        index = columns.view(len(t), *[-1 if d == dim else 1 for d in range(1, t.dim())])
        return t.gather(dim, index.expand(t.shape))

    return _Aligned(
        gathered(keys, 2),
        gathered(values, 2),
        None if mask is None else gathered(mask, mask.dim() - 1),
    )
