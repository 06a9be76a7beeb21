// torch's dropout with the masks that torch would draw, at a fraction of its time.
//
// torch draws a mask on the CPU with one thread, through a call of the generator and a division for
// each element, and keeps it as a tensor of x's dtype. Here the same words of the same generator
// (MT19937) are made a block at a time, the mask is a byte an element, and both directions multiply
// in parallel.
#pragma once

#include <ATen/core/Tensor.h>

namespace pelt_fast {

// Whether torch draws masks as `draw_mask` does. With MKL on processors of its maker it does not.
bool draws_as_torch();

// A byte for each of n elements, 1 where it is kept, which has the probability `keep`; moves the
// default generator on as torch's dropout does.
at::Tensor draw_mask(int64_t n, double keep);

// x · mask / keep, as torch rounds it; float32, mask of x's elements in the order of a contiguous
// x.
at::Tensor masked(const at::Tensor& x, const at::Tensor& mask, double keep);

} // namespace pelt_fast
