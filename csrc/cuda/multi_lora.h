// What the operator (multi_lora_op.cpp, torch, no CUDA compiler) and the kernels (multi_lora.cu,
// CUDA, no torch) of multi-LoRA tell each other.
#pragma once

#include <cstdint>

namespace pelt_fast::multi_lora {

constexpr int kRun = 8;                 // neighbours of k or of j that one lane sums
constexpr int kPassColumns = 32 * kRun; // of K, that a warp covers at once
constexpr int kMaxSplits = 16;          // of K
constexpr int kMaxRank = 256;
constexpr int kMaxProjections = 4; // of one launch: q, k, v; gate, up

enum class Type : int32_t { kFloat, kHalf, kBFloat16 };

// One projection as kernels see it. Strides count elements.
struct Projection {
  const void* a;        // (L, R, K)
  const void* b;        // (L, N, R)
  const void* base;     // (T, N) or null
  void* y;              // (T, N)
  const int32_t* ranks; // (L,)
  const float* scaling; // (L,)
  int64_t a_adapter, a_rank, a_column;
  int64_t b_adapter, b_row, b_rank;
  int64_t base_token, y_token;
  int32_t rank;       // R, at most kMaxRank
  int32_t first_rank; // of this projection's columns among all of s
  int32_t out_features;
  int32_t lanes; // that share a row of B
};

struct Arguments {
  const void* x;          // (T, K)
  const int32_t* perm;    // (C,)
  const int32_t* tiles;   // (tiles, 4): adapter or -1, first position in perm, rows, 0
  const float* row_scale; // (T,) or null
  float* partials;        // (splits, T, total_rank)
  void* s;                // (T, total_rank)
  int64_t x_token;
  int64_t tokens;
  int32_t in_features;
  int32_t total_rank;
  int32_t splits;
  int32_t passes;   // of kPassColumns, in one split
  int32_t in_place; // y is base: rows that nothing is added to are left alone
  Projection projections[kMaxProjections];
};

// Passes that each split of K makes. The splits follow from K alone (they are the first dimension
// of the partials): the order of a sum does not depend on the batch.
inline int32_t passes_of(int64_t in_features, int64_t splits) {
  const int64_t columns = splits * kPassColumns;
  return int32_t((in_features + columns - 1) / columns);
}

// As many lanes as have work share a row of B, so that a warp reads whole sectors.
inline int32_t lanes_of(int64_t rank) {
  return rank > 2 * kRun ? 4 : rank > kRun ? 2 : 1;
}

// Which instantiation of the kernels runs.
struct Kinds {
  Type x;                    // of base, y and s too
  Type a, b;                 // x's or float
  bool a_aligned, b_aligned; // may x and A, may B, base and y be accessed in 16 bytes
};

// Both kernels, for the first `projections` of the arguments. Returns what is wrong, or null.
const char* launch(const Arguments& arguments, int64_t tiles, int projections, const Kinds& kinds,
                   void* stream);

} // namespace pelt_fast::multi_lora
