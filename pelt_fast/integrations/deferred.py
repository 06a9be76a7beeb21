"""Keys, values and mask with a prefix in front of them that were not concatenated.

A ``Deferred`` tensor knows its shape, dtype and device. ``scaled_dot_product_attention`` takes keys, values and mask in
their parts; any other operation gets the concatenated tensor, made once. So whatever stands between the layer that
returns them and the attention that reads them, results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..functional import prefix_attention
from ..functional.attention import attention


class Deferred(Tensor):
    """A tensor whose elements are put together when they are asked for."""

    rest: Tensor  # the part without the prefix
    _whole: Tensor | None

    @classmethod
    def _of(cls, rest: Tensor, shape: Sequence[int]) -> Any:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=rest.dtype, device=rest.device)
        made.rest, made._whole = rest, None
        return made

    def concatenate(self) -> Tensor:
        """The tensor itself."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """The tensor itself, the same each time: it may have been changed in place."""
        if self._whole is None:
            self._whole = self.concatenate()
        return self._whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            out = _attention(*args, **kwargs)
            if out is not None:
                return out
        if func is Tensor.__getitem__ and _is_all(*args):
            return args[0]
        args, kwargs = tree_map_only(Deferred, lambda t: t.whole(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:  # type: ignore[override]
        # reached only past __torch_function__, from C++ or a disabled one
        args, kwargs = tree_map_only(Deferred, lambda t: t.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)


class Query(Deferred):
    """Queries (B, H, L, D) as they are, whose attention is ours."""

    @classmethod
    def of(cls, query: Tensor) -> Query:
        """The same elements."""
        made: Query = cls._of(query, query.shape)
        return made

    def concatenate(self) -> Tensor:
        """All there is."""
        return self.rest


class PrefixedStates(Deferred):
    """Keys or values (B, H, P + S, D)."""

    prefix: Tensor

    @classmethod
    def of(cls, prefix: Tensor, states: Tensor) -> PrefixedStates:
        """prefix (B, H, P, D) in front of states (B, H, S, D), which may have a prefix already."""
        if isinstance(states, PrefixedStates) and states._whole is None:
            prefix, states = torch.cat([prefix, states.prefix], 2), states.rest
        batch, heads, keys, features = states.shape
        made: PrefixedStates = cls._of(states, (batch, heads, prefix.shape[2] + keys, features))
        made.prefix = prefix
        return made

    def concatenate(self) -> Tensor:
        """Of both parts."""
        return torch.cat([self.prefix, self.rest], 2)


class PrefixedMask(Deferred):
    """An additive mask (B, 1 or H, L, P + S), 0 over the prefix."""

    prefix_length: int

    @classmethod
    def of(cls, mask: Tensor, prefix_length: int) -> PrefixedMask:
        """``prefix_length`` zeros in front of the mask's columns, which may have a prefix already."""
        if isinstance(mask, PrefixedMask) and mask._whole is None:
            prefix_length, mask = prefix_length + mask.prefix_length, mask.rest
        made: PrefixedMask = cls._of(mask, (*mask.shape[:-1], prefix_length + mask.shape[-1]))
        made.prefix_length = prefix_length
        return made

    def concatenate(self) -> Tensor:
        """Of both parts."""
        return F.pad(self.rest, (self.prefix_length, 0))


_KNOWN = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
}
"""What is known without the elements."""


def _is_all(tensor: Any, index: Any) -> bool:
    """Whether ``tensor[index]`` is all of the tensor, as where a mask is cut to the number of keys."""
    if not isinstance(tensor, Deferred) or not isinstance(index, tuple):
        return False
    return len(index) <= tensor.dim() and all(
        type(part) is slice
        and part.start in (None, 0)
        and part.step in (None, 1)
        and (part.stop is None or (type(part.stop) is int and part.stop >= size))
        for part, size in zip(index, tensor.shape, strict=False)
    )


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention of the parts; None where it must be of the whole tensors."""
    if isinstance(query, Query):
        query, key, value, attn_mask = tree_map_only(
            Deferred, lambda t: t.whole(), (query, key, value, attn_mask)
        )
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    parts = (key, value) if attn_mask is None else (key, value, attn_mask)
    if type(query) is not Tensor or any(
        not isinstance(t, Deferred) or t._whole is not None for t in parts
    ):
        return None
    # causal over the concatenated keys would be another thing than causal behind a prefix
    if is_causal or dropout_p or query.shape[1] != key.shape[1] or query.dtype != key.dtype:
        return None
    if key.prefix.dtype != key.rest.dtype or key.prefix.shape[2] != value.prefix.shape[2]:
        return None
    mask = None if attn_mask is None else attn_mask.rest
    return prefix_attention(
        query, key.rest, value.rest, key.prefix, value.prefix, attn_mask=mask, scale=scale
    )
