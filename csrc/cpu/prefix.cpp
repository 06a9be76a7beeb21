// Attention over a prefix and a sequence that are two tensors. torch's attention takes the
// sequence, and what the prefix adds is folded into its result, a block of rows at a time:
//
//   s_j = scale · q · k_j over the prefix;  m = max(lse, max s)
//   w = exp(lse - m);  p_j = exp(s_j - m);  z = w + Σ p_j
//   out = (w · out + Σ p_j v_j) / z
//
// The prefix is short: its keys and values stay in level 1, q and out pass once. Concatenating K
// and V instead reads and writes both, and so does the mask.
#include "prefix.h"

#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>

#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "engine.h"

namespace pelt_fast {
namespace {

constexpr int64_t kRows =
    64; // of a block: with D = 64 its tiles and the prefix share level 1 and 2

template <class T>
struct Fold {
  using A = Acc<T>;

  const Kernels<T>& kernels;
  const at::Tensor &query, &prefix_key, &prefix_value;
  const at::Tensor &out, &log_sum; // (B, L, H, D), changed; (B, L, H); both contiguous
  const A scale;
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2),
                d = query.size(3), prefix = prefix_key.size(2);
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t d_padded = round_up(d, kernels.lanes),
                prefix_padded = round_up(prefix, kernels.lanes);
  // one prefix for the whole batch is packed once for each head
  const bool shared = batch == 1 || (prefix_key.stride(0) == 0 && prefix_value.stride(0) == 0);

  // The transposed keys (D, P) and the values (P, D) of one head, both padded with zeros.
  void pack(int64_t b, int64_t h, A* keys, A* values) const {
    const T* k = data<T>(prefix_key) + b * prefix_key.stride(0) + h * prefix_key.stride(1);
    const T* v = data<T>(prefix_value) + b * prefix_value.stride(0) + h * prefix_value.stride(1);
    A* row = workspace().shrunk.get<A>(d_padded);
    std::fill_n(keys, d * prefix_padded, A(0));
    for (int64_t j = 0; j < prefix; ++j) {
      kernels.widen(d, d_padded, k + j * prefix_key.stride(2), nullptr, 0, row);
      for (int64_t i = 0; i < d; ++i) keys[i * prefix_padded + j] = row[i];
      kernels.widen(d, d_padded, v + j * prefix_value.stride(2), nullptr, 0, values + j * d_padded);
    }
  }

  void block(int64_t b, int64_t h, int64_t begin, int64_t end, const A* keys,
             const A* values) const {
    const int64_t m = end - begin;
    Workspace& space = workspace();
    const T* q =
        data<T>(query) + b * query.stride(0) + h * query.stride(1) + begin * query.stride(2);
    T* y = static_cast<T*>(out.mutable_data_ptr()) + ((b * rows + begin) * heads + h) * d;
    const A* sums = data<A>(log_sum) + (b * rows + begin) * heads + h;

    const A* left;
    int64_t left_stride;
    A* result;
    int64_t result_stride;
    bool copied = true;
    if constexpr (std::is_same_v<T, A>) {
      left = q;
      left_stride = query.stride(2);
      copied = d != d_padded;
    } else {
      A* tile = space.left.get<A>(m * d_padded);
      for (int64_t i = 0; i < m; ++i)
        kernels.widen(d, d_padded, q + i * query.stride(2), nullptr, 0, tile + i * d_padded);
      left = tile;
      left_stride = d_padded;
    }
    if (copied) {
      result = space.product.get<A>(m * d_padded);
      result_stride = d_padded;
      for (int64_t i = 0; i < m; ++i)
        kernels.widen(d, d_padded, y + i * heads * d, nullptr, 0, result + i * d_padded);
    } else {
      result = reinterpret_cast<A*>(y);
      result_stride = heads * d;
    }

    A* scores = space.delta.get<A>(m * prefix_padded);
    kernels.gemm_wide(m, prefix_padded, d, left, left_stride, keys, prefix_padded, scores,
                      prefix_padded, false);
    for (int64_t i = 0; i < m; ++i) {
      const A share = kernels.rows.join_softmax(prefix, prefix_padded, scale, sums[i * heads],
                                                scores + i * prefix_padded);
      A* row = result + i * result_stride;
      for (int64_t c = 0; c < d; ++c) row[c] *= share;
    }
    kernels.gemm_wide(m, d_padded, prefix, scores, prefix_padded, values, d_padded, result,
                      result_stride, true);
    if (copied)
      for (int64_t i = 0; i < m; ++i)
        kernels.narrow(d, result + i * d_padded, nullptr, y + i * heads * d);
  }

  void run() const {
    const int64_t products = std::min(kRows, rows) * prefix * d * 2;
    const int64_t grain = std::max<int64_t>(1, Plan::kAlone / 2 / std::max<int64_t>(1, products));
    at::parallel_for(0, heads * batch * blocks, grain, [&](int64_t from, int64_t to) {
      Workspace& space = workspace();
      A* keys = space.right.get<A>(d * prefix_padded);
      A* values = space.transposed.get<A>(prefix * d_padded);
      int64_t packed = -1;
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t h = unit / (batch * blocks), b = unit / blocks % batch, i = unit % blocks;
        const int64_t wanted = shared ? h : h * batch + b;
        if (packed != wanted) pack(b, h, keys, values);
        packed = wanted;
        block(b, h, i * kRows, std::min(rows, (i + 1) * kRows), keys, values);
      }
    });
  }
};

} // namespace

at::Tensor prefix_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                            const OptionalTensor& mask, bool is_causal, double scale) {
  check_memory("query", query);
  check_memory("key", key);
  check_memory("value", value);
  check_memory("prefix_key", prefix_key);
  check_memory("prefix_value", prefix_value);
  check_memory("attn_mask", mask);
  auto [result, sums] = at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0,
                                                                        is_causal, mask, scale);
  at::Tensor out = result.transpose(1, 2).contiguous(), log_sum = sums.transpose(1, 2).contiguous();
  with_engine(query.scalar_type(), [&](const auto& engine) {
    using T = typename std::decay_t<decltype(engine)>::T;
    Fold<T>{engine.kernels, query, prefix_key, prefix_value, out, log_sum, Acc<T>(scale)}.run();
  });
  return out;
}

} // namespace pelt_fast
