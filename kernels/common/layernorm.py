"""Statistics of rows that come in chunks of columns, without the cancellation of E[x²] - E[x]².

Each chunk is centred on its own mean; chunks are combined as in Chan, Golub and LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances" (1979). One pass, as accurate as two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def include_chunk(values, live, before, width, mean, squares):
    """Mean and sum of squared deviations of rows after one more chunk.

    values (BLOCK_T, BLOCK_D) fp32 of which the columns ``live`` (BLOCK_D,) count, ``width`` of them; ``before``
    columns are in ``mean`` and ``squares`` (BLOCK_T,) already.
    """
    total = before + width
    centre = tl.sum(tl.where(live[None, :], values, 0.0), 1) / width
    deviation = tl.where(live[None, :], values - centre[:, None], 0.0)
    delta = centre - mean
    squares += tl.sum(deviation * deviation, 1) + delta * delta * ((before * 1.0) * width / total)
    return mean + delta * (width * 1.0 / total), squares
