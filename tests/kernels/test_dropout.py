"""The mask that kernels make in registers is the package's mask, bit for bit."""

import pytest
import torch

from pelt_fast.random import philox_mask

triton = pytest.importorskip("triton")
import triton.language as tl

from pelt_fast.kernels.common.adapters import AdapterTable
from pelt_fast.kernels.common.dropout import keep_mask


@triton.jit
def _mask_kernel(
    out_ptr, seed_ptr, first_row, tokens, features, threshold,
    ADAPTER: tl.constexpr, BY_FOUR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    keep = keep_mask(
        tl.load(seed_ptr), first_row + rows.to(tl.int64), tl.program_id(1) * BLOCK_K, features,
        ADAPTER, threshold, BLOCK_T, BLOCK_K, BY_FOUR,
    )  # fmt: skip
    live = (rows[:, None] < tokens) & (columns[None, :] < features)
    tl.store(out_ptr + rows[:, None] * features + columns[None, :], keep.to(tl.int8), mask=live)


def _kernel_mask(kernels, seed, first_row, tokens, features, p, adapter, block_t, block_k):
    (threshold,) = AdapterTable.make([1], [1.0], [p]).thresholds
    out = torch.zeros((tokens, features), dtype=torch.int8, device=kernels.device)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(features, block_k))
    with kernels.context():
        _mask_kernel[grid](
            out, seed, first_row, tokens, features, threshold,
            ADAPTER=adapter, BY_FOUR=features % 4 == 0, BLOCK_T=block_t, BLOCK_K=block_k,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out.bool()


@pytest.mark.parametrize("features", [40, 37], ids=["one call for four", "one call each"])
@pytest.mark.parametrize("seed", [0, -1, 0x123456789ABCDEF])
def test_is_the_mask_of_the_package(features, seed, kernels):
    seed = torch.tensor([seed], device=kernels.device)
    for p, adapter in ((0.1, 0), (0.5, 3), (0.9, 1)):
        expected = philox_mask(seed, (13, features), p, adapter)
        for tile in ((16, 16), (4, 64)):
            mask = _kernel_mask(kernels, seed, 0, 13, features, p, adapter, *tile)
            assert torch.equal(mask, expected)


def test_elements_past_two_to_the_34(kernels):
    """There the counter of Philox has a high word."""
    from pelt_fast.random import keep_threshold, philox_words

    seed, features, first_row = torch.tensor([7], device=kernels.device), 64, 2**34 // 64
    mask = _kernel_mask(kernels, seed, first_row, 4, features, 0.5, 0, 4, 64)
    counter = (first_row * features + torch.arange(0, 4 * features, 4, device=kernels.device)) // 4
    words = philox_words(counter, 0, seed).reshape(4, features)
    assert torch.equal(mask, words >= keep_threshold(0.5))
    assert not torch.equal(mask, philox_mask(seed, (4, features), 0.5))
