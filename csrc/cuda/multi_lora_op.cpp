// The operator pelt_fast_cuda::multi_lora_fwd. It uses torch's stable ABI alone: headers of CUDA's
// libraries (cuBLAS, cuSPARSE), which ATen's CUDA headers include, need not be there, and a library
// built once serves later versions of torch.
//
// Shapes and dtypes were checked in pelt_fast/functional. Nothing here waits for the device or
// reads its memory.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 13) << 48))
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "multi_lora.h"

// The tests run the kernels on tensors of the CPU, by an emulator in the place of CUDA's runtime.
#ifndef PELT_FAST_CUDA_DISPATCH_KEY
#define PELT_FAST_CUDA_DISPATCH_KEY CUDA
#endif

namespace pelt_fast::multi_lora {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "multi_lora: no CUDA kernel for this dtype");
  }
}

// Whether rows of a tensor, whose last stride is 1, start at multiples of 16 bytes.
bool aligned(const Tensor& t) {
  const int64_t size = int64_t(t.element_size()), last = t.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) fits = fits && t.stride(i) * size % 16 == 0;
  return fits;
}

int32_t narrow(int64_t value, const char* what) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int32_t>::max() - (1 << 16), "multi_lora: ", what,
                  " of ", value, " are more than the CUDA kernels count");
  return int32_t(value);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void* current_stream(const Tensor& x) {
  if (!x.is_cuda()) return nullptr;
  return torch::stable::accelerator::getCurrentStream(x.get_device_index()).nativeHandle();
}

void forward(const Tensor& x, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
             const std::vector<Tensor>& base, const Tensor& perm, const Tensor& tiles,
             const std::vector<Tensor>& ranks, const std::vector<Tensor>& scaling,
             const std::optional<Tensor>& row_scale, const Tensor& partials, const Tensor& s,
             const std::vector<Tensor>& y, bool in_place) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (x.is_cuda()) guard.emplace(x.get_device_index());
  Arguments arguments = {};
  arguments.x = x.data_ptr();
  arguments.perm = data<int32_t>(perm);
  arguments.tiles = data<int32_t>(tiles);
  arguments.row_scale = row_scale ? data<float>(*row_scale) : nullptr;
  arguments.s = s.data_ptr();
  arguments.x_token = x.stride(0);
  arguments.tokens = x.size(0);
  arguments.in_features = narrow(x.size(1), "input features");
  arguments.total_rank = narrow(s.size(1), "rank columns");
  arguments.splits = int32_t(partials.size(0));
  arguments.passes = passes_of(x.size(1), partials.size(0));
  arguments.in_place = in_place;
  const int64_t tile_count = narrow(tiles.size(0), "tiles");
  arguments.partials = data<float>(partials);
  void* const stream = current_stream(x);

  const size_t count = lora_a.size();
  int32_t first_rank = 0;
  for (size_t start = 0, end = 0; start < count; start = end) {
    Kinds kinds{type_of(x), type_of(lora_a[start]), type_of(lora_b[start]), aligned(x), true};
    STD_TORCH_CHECK((kinds.a == kinds.x || kinds.a == Type::kFloat) &&
                        (kinds.b == kinds.x || kinds.b == Type::kFloat),
                    "multi_lora: weights are neither of x's dtype nor float32");
    for (; end < count && end < start + kMaxProjections; ++end) {
      const Tensor &a = lora_a[end], &b = lora_b[end];
      if (type_of(a) != kinds.a || type_of(b) != kinds.b) break;
      Projection& p = arguments.projections[end - start];
      p = {};
      p.a = a.data_ptr();
      p.b = b.data_ptr();
      p.y = y[end].data_ptr();
      p.ranks = data<int32_t>(ranks[end]);
      p.scaling = data<float>(scaling[end]);
      p.a_adapter = a.stride(0), p.a_rank = a.stride(1), p.a_column = a.stride(2);
      p.b_adapter = b.stride(0), p.b_row = b.stride(1), p.b_rank = b.stride(2);
      p.y_token = y[end].stride(0);
      p.rank = narrow(a.size(1), "ranks");
      STD_TORCH_CHECK(p.rank <= kMaxRank, "multi_lora: rank ", p.rank, " is above ", kMaxRank);
      p.first_rank = first_rank;
      p.out_features = narrow(b.size(1), "output features");
      p.lanes = lanes_of(p.rank);
      kinds.a_aligned = kinds.a_aligned && aligned(a);
      kinds.b_aligned = kinds.b_aligned && aligned(b) && aligned(y[end]);
      const Tensor& from = base[end]; // empty where there is none
      if (from.dim() == 2) {
        p.base = from.data_ptr();
        p.base_token = from.stride(0);
        kinds.b_aligned = kinds.b_aligned && aligned(from);
      }
      first_rank += p.rank;
    }
    const char* error = launch(arguments, tile_count, int(end - start), kinds, stream);
    STD_TORCH_CHECK(error == nullptr, "multi_lora: CUDA says: ", error);
  }
}

} // namespace

STABLE_TORCH_LIBRARY(pelt_fast_cuda, m) {
  m.def(
      "multi_lora_fwd(Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor[] base, Tensor perm, "
      "Tensor tiles, Tensor[] ranks, Tensor[] scaling, Tensor? row_scale, Tensor(a!) partials, "
      "Tensor(b!) s, Tensor(c!)[] y, bool in_place) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cuda, PELT_FAST_CUDA_DISPATCH_KEY, m) {
  m.impl("multi_lora_fwd", TORCH_BOX(&forward));
}

} // namespace pelt_fast::multi_lora
