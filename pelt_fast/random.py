"""The dropout mask: Philox4x32-10 keyed on (seed, element index), so that backward draws it again.

Element (t, k) of a (T, in) input has index e = t * in + k. Its 32 random bits are word e % 4 of
``philox(key=seed, counter=(lo32(e // 4), hi32(e // 4), adapter_index, 0))``. The mask therefore depends on
nothing but the seed, the adapter's position and the element: not on tiles, threads or the backend.

Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_INT64_MAX = 2**63 - 1


def new_seed(device: torch.device) -> Tensor:
    """Draws a seed, int64 of shape (1,) on ``device``, from torch's generator of that device.

    A tensor, not a number: no synchronisation, safe under CUDA graphs, and activation checkpointing restores it.
    """
    return torch.randint(-_INT64_MAX - 1, _INT64_MAX, (1,), dtype=torch.int64, device=device)


def keep_threshold(p: float) -> int:
    """An element is kept when its 32 random bits are at least this."""
    return min(round(p * 2**32), _M32)


def philox_words(counter: Tensor, stream: int, seed: Tensor) -> Tensor:
    """Philox4x32-10 of the 64-bit ``counter`` (n,) and ``stream``: words (n, 4), each an int64 below 2**32."""
    c0, c1 = counter & _M32, (counter >> 32) & _M32
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(10):
        # int64 products wrap modulo 2**64, so both 32-bit halves come out right
        p0, p1 = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _M32) ^ c1 ^ k0,
            p1 & _M32,
            ((p0 >> 32) & _M32) ^ c3 ^ k1,
            p0 & _M32,
        )
        k0, k1 = (k0 + _KEY_A) & _M32, (k1 + _KEY_B) & _M32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_mask(seed: Tensor, shape: tuple[int, int], p: float, adapter_index: int = 0) -> Tensor:
    """The keep mask of one adapter.

    Args:
        seed: int64 of one element, on the device where the mask is wanted.
        shape: (T, in).
        p: probability that an element is dropped.
        adapter_index: position of the adapter among the active ones.

    Returns:
        bool of shape (T, in), True where the element is kept.
    """
    elements = shape[0] * shape[1]
    if p >= 1.0:
        return torch.zeros(shape, dtype=torch.bool, device=seed.device)
    counter = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seed.device)
    words = philox_words(counter, adapter_index, seed.reshape(1))
    return (words.reshape(-1)[:elements] >= keep_threshold(p)).reshape(shape)


def philox_odds(seed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(1 - u) / u of uniform numbers u = (word + 1/2) / 2**32, with the words of a mask of adapter 0.

    Odds and no u: where u is near 1, what is left of 1 - u after rounding would have no digits.
    """
    elements = math.prod(shape)
    counter = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seed.device)
    words = philox_words(counter, 0, seed.reshape(1)).reshape(-1)[:elements].reshape(tuple(shape))
    return ((_M32 - words).to(dtype) + 0.5) / (words.to(dtype) + 0.5)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by, 1 / (1 - p); 0 where everything is dropped."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
