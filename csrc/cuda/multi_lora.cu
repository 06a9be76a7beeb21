// Multi-LoRA for few tokens, each with its own adapter (bgmv): two kernels, no atomics, no host
// synchronisation, a grid that follows from shapes alone, so that a CUDA graph may hold it.
//
//   multi_lora_shrink   partials[split, t, j] = sum over a split of K of x[t, k] * A[g, j, k]
//   multi_lora_expand   s[t, j] = the partials, added in order, rounded to x's dtype
//                       y[t, n] = base[t, n] + scaling[g] * row_scale[t] * sum_j s[t, j] * B[g, n,
//                       j]
//
// A block takes one tile of the plan, at most 16 rows of one adapter, so that an adapter's weights
// are read from memory once per tile and nothing of one adapter touches another's arithmetic. The
// splits of K follow from K alone, and a sum has the same order whatever the number of rows, the
// alignment and the strides: a token's result has the same bits alone and in any batch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "multi_lora.h"

namespace pelt_fast::multi_lora {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 16;      // of the plan's tiles16
constexpr int kRanks = 4;          // rank rows that a warp works on at once
constexpr int kColumns = kThreads; // of N, for one block of expand

__device__ __forceinline__ float widen(float v) {
  return v;
}
__device__ __forceinline__ float widen(__half v) {
  return __half2float(v);
}
__device__ __forceinline__ float widen(__nv_bfloat16 v) {
  return __uint_as_float(uint32_t(__bfloat16_as_ushort(v)) << 16);
}

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class T>
struct alignas(16) Pack { // one access of 16 bytes
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  union {
    uint4 bits;
    Pack<T> pack;
  } u{__ldg(reinterpret_cast<const uint4*>(p))};
  return u.pack;
}

// kRun elements from p on, 0 from `valid` on whatever stands there; `there` is how many memory has.
template <bool kAligned, class T>
__device__ __forceinline__ void load_run(const T* p, int64_t stride, int valid, int there,
                                         float (&v)[kRun]) {
  if (kAligned && there >= kRun) {
#pragma unroll
    for (int i = 0; i < kRun; i += Pack<T>::size) {
      const Pack<T> pack = load_pack(p + i);
#pragma unroll
      for (int e = 0; e < Pack<T>::size; ++e) {
        v[i + e] = i + e < valid ? widen(pack.values[e]) : 0.f;
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < kRun; ++e) v[e] = e < valid ? widen(p[e * stride]) : 0.f;
  }
}

struct Tile {
  int adapter, first, rows;
};

// This block's. The plan's arrays are views of one buffer: not aligned to more than an int.
__device__ __forceinline__ Tile load_tile(const Arguments& args) {
  const int32_t* tile = args.tiles + int64_t(blockIdx.x) * 4;
  return {__ldg(tile), __ldg(tile + 1), __ldg(tile + 2)};
}

// Sums each of kValues values over the lanes of a warp; afterwards a lane holds, in v[0], the one
// that value_of_lane names. A sum is the same tree whatever kValues: lanes 16 apart, then 8, 4,
// 2, 1.
template <int kValues, int kOffset = 16, int kSize>
__device__ __forceinline__ void sum_over_lanes(float (&v)[kSize], int lane) {
  if constexpr (kOffset > 0) {
    constexpr int kHalf = kValues / 2;
    if constexpr (kHalf > 0) {
      const bool upper = lane & kOffset;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        // not upper ? v[i] : v[j]: that would choose an address and put v into memory
        const float low = v[i], high = v[i + kHalf];
        const float keep = upper ? high : low, give = upper ? low : high;
        v[i] = keep + __shfl_xor_sync(0xffffffffu, give, kOffset);
      }
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], kOffset);
    }
    sum_over_lanes<(kHalf > 0 ? kHalf : 1), kOffset / 2>(v, lane);
  }
}

// The lane's upper bits: each step of the sum settles one of them.
template <int kValues>
__device__ __forceinline__ int value_of_lane(int lane) {
  return lane / (32 / kValues);
}

// kRows rows of a tile from `row` on, of which `rows` are there.
template <int kRows, bool kAligned, class X, class W>
__device__ __forceinline__ void shrink_rows(const Arguments& args, const Projection& p,
                                            const W* a_adapter, int rank, const int* tokens,
                                            int rows, int split, int warp, int lane) {
  const X* x = static_cast<const X*>(args.x);
  const int first = split * args.passes * kPassColumns + lane * kRun;
  for (int j0 = warp * kRanks; j0 < rank; j0 += kWarps * kRanks) {
    float sums[kRows * kRanks] = {};
    for (int pass = 0; pass < args.passes; ++pass) {
      const int k = first + pass * kPassColumns;
      const int there = args.in_features - k;
      float a[kRanks][kRun];
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        const W* row = a_adapter + (j0 + j) * p.a_rank + k * p.a_column;
        const int wanted = j0 + j < rank ? there : 0;
        load_run<kAligned>(row, p.a_column, wanted, wanted, a[j]);
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        float v[kRun];
        const X* row = x + tokens[min(m, rows - 1)] * args.x_token + k;
        load_run<kAligned>(row, 1, there, there, v);
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            sums[m * kRanks + j] = fmaf(v[e], a[j][e], sums[m * kRanks + j]);
          }
        }
      }
    }
    sum_over_lanes<kRows * kRanks>(sums, lane);
    const int value = value_of_lane<kRows * kRanks>(lane);
    const int m = value / kRanks, j = j0 + value % kRanks;
    if (lane % (32 / (kRows * kRanks)) == 0 && m < rows && j < rank) {
      const int64_t row = int64_t(split) * args.tokens + tokens[m];
      args.partials[row * args.total_rank + p.first_rank + j] = sums[0];
    }
  }
}

// Grid: (tiles, splits, projections).
template <class X, class W, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 4 : 3)
    shrink(const __grid_constant__ Arguments args) {
  const Projection& p = args.projections[blockIdx.z];
  const Tile tile = load_tile(args);
  const int adapter = tile.adapter, rows = tile.rows;
  if (adapter < 0 || rows == 0) return;
  const int rank = min(max(__ldg(p.ranks + adapter), 0), p.rank);
  if (rank == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const W* a = static_cast<const W*>(p.a) + adapter * p.a_adapter;
  __shared__ int tokens[kTileRows];
  if (threadIdx.x < rows) tokens[threadIdx.x] = __ldg(args.perm + tile.first + threadIdx.x);
  __syncthreads();
  if (rows == 1) {
    shrink_rows<1, kAligned, X>(args, p, a, rank, tokens, 1, blockIdx.y, warp, lane);
    return;
  }
  for (int m = 0; m < rows; m += 8) {
    const int left = rows - m;
    if (left <= 4) {
      shrink_rows<4, kAligned, X>(args, p, a, rank, tokens + m, left, blockIdx.y, warp, lane);
    } else {
      shrink_rows<8, kAligned, X>(args, p, a, rank, tokens + m, min(left, 8), blockIdx.y, warp,
                                  lane);
    }
  }
}

// Products of kRows rows of s with this block's columns of B, into sums (rows, kColumns).
template <int kRows, bool kAligned, class W>
__device__ __forceinline__ void expand_rows(const Projection& p, const W* b_adapter, int rank,
                                            const float* s, int s_row, float* sums, int rows,
                                            int first_column, int warp, int lane) {
  const int part = lane % p.lanes, each = 32 / p.lanes;
  for (int i = 0; i < p.lanes; ++i) {
    const int column = warp * 32 + i * each + lane / p.lanes, n = first_column + column;
    float acc[kRows] = {};
    if (n < p.out_features) {
      for (int j = part * kRun; j < rank; j += p.lanes * kRun) {
        float b[kRun];
        const W* row = b_adapter + n * p.b_row + j * p.b_rank;
        load_run<kAligned>(row, p.b_rank, rank - j, p.rank - j, b);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          const float4* v = reinterpret_cast<const float4*>(s + min(m, rows - 1) * s_row + j);
          const float4 low = v[0], high = v[1];
          acc[m] = fmaf(low.x, b[0], acc[m]);
          acc[m] = fmaf(low.y, b[1], acc[m]);
          acc[m] = fmaf(low.z, b[2], acc[m]);
          acc[m] = fmaf(low.w, b[3], acc[m]);
          acc[m] = fmaf(high.x, b[4], acc[m]);
          acc[m] = fmaf(high.y, b[5], acc[m]);
          acc[m] = fmaf(high.z, b[6], acc[m]);
          acc[m] = fmaf(high.w, b[7], acc[m]);
        }
      }
    }
    for (int offset = 1; offset < p.lanes; offset *= 2) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) acc[m] += __shfl_xor_sync(0xffffffffu, acc[m], offset);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (part == 0 && m < rows) sums[m * kColumns + column] = acc[m];
    }
  }
}

// Grid: (tiles, blocks of kColumns columns, projections); s_row floats of dynamic shared memory for
// each row of a tile. s_row: the largest R, up to a multiple of kRun.
template <class X, class W, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4)
    expand(const __grid_constant__ Arguments args, int s_row) {
  const Projection& p = args.projections[blockIdx.z];
  const Tile tile = load_tile(args);
  const int adapter = tile.adapter, rows = tile.rows, first_column = int(blockIdx.y) * kColumns;
  if (rows == 0 || (first_column >= p.out_features && blockIdx.y > 0)) return;
  const int rank = adapter < 0 ? 0 : min(max(__ldg(p.ranks + adapter), 0), p.rank);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  extern __shared__ float4 dynamic_shared[];
  float* s = reinterpret_cast<float*>(dynamic_shared);
  __shared__ int tokens[kTileRows];
  __shared__ float factors[kTileRows];
  __shared__ __align__(16) float sums[kTileRows * kColumns];
  if (threadIdx.x < rows) {
    const int token = __ldg(args.perm + tile.first + threadIdx.x);
    const float scale = rank == 0 ? 0.f : __ldg(p.scaling + adapter);
    tokens[threadIdx.x] = token;
    factors[threadIdx.x] = args.row_scale ? scale * __ldg(args.row_scale + token) : scale;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < rows * s_row; i += kThreads) {
    const int m = i / s_row, j = i % s_row;
    X rounded = narrow<X>(0.f);
    if (j < rank) {
      const int64_t step = args.tokens * args.total_rank;
      const float* partial =
          args.partials + int64_t(tokens[m]) * args.total_rank + p.first_rank + j;
      float sum = 0.f;
      for (int split = 0; split < args.splits; ++split) sum += partial[split * step];
      rounded = narrow<X>(sum);
    }
    s[i] = widen(rounded);
    if (blockIdx.y == 0 && j < p.rank) {
      static_cast<X*>(args.s)[int64_t(tokens[m]) * args.total_rank + p.first_rank + j] = rounded;
    }
  }
  if (rank == 0 && args.in_place) return;
  __syncthreads();

  if (rank > 0) {
    const W* b = static_cast<const W*>(p.b) + adapter * p.b_adapter;
    for (int m = 0; m < rows; m += 8) {
      const int left = rows - m;
      float* out = sums + m * kColumns;
      const float* in = s + m * s_row;
      if (left == 1) {
        expand_rows<1, kAligned>(p, b, rank, in, s_row, out, 1, first_column, warp, lane);
      } else if (left <= 4) {
        expand_rows<4, kAligned>(p, b, rank, in, s_row, out, left, first_column, warp, lane);
      } else {
        expand_rows<8, kAligned>(p, b, rank, in, s_row, out, min(left, 8), first_column, warp,
                                 lane);
      }
    }
    __syncthreads();
  }

  const X* base = static_cast<const X*>(p.base);
  X* y = static_cast<X*>(p.y);
  constexpr int kPack = Pack<X>::size, kPacks = kColumns / kPack;
  for (int i = threadIdx.x; i < rows * kPacks; i += kThreads) {
    // neighbours of a lane: in 16 bytes of it if rows are aligned, else in the lanes beside it
    const int m = i / kPacks, step = kAligned ? 1 : kPacks;
    const int c = kAligned ? i % kPacks * kPack : i % kPacks;
    const int64_t token = tokens[m];
    const X* from = base + token * p.base_token + first_column + c;
    X* to = y + token * p.y_token + first_column + c;
    const bool whole = kAligned && first_column + c + kPack <= p.out_features;
    Pack<X> pack = {};
    if (base && whole) {
      pack = *reinterpret_cast<const Pack<X>*>(from);
    } else if (base) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (first_column + c + e * step < p.out_features) pack.values[e] = from[e * step];
      }
    }
    if (rank > 0) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float sum = sums[m * kColumns + c + e * step];
        pack.values[e] = narrow<X>(fmaf(factors[m], sum, widen(pack.values[e])));
      }
    }
    if (whole) {
      *reinterpret_cast<Pack<X>*>(to) = pack;
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (first_column + c + e * step < p.out_features) to[e * step] = pack.values[e];
      }
    }
  }
}

struct Launch {
  const Arguments& arguments;
  unsigned tiles, projections;
  cudaStream_t stream;

  template <class X, class W>
  void run_shrink(bool aligned) const {
    const dim3 grid(tiles, unsigned(arguments.splits), projections);
    const auto kernel = aligned ? shrink<X, W, true> : shrink<X, W, false>;
    kernel<<<grid, kThreads, 0, stream>>>(arguments);
  }

  template <class X, class W>
  void run_expand(bool aligned) const {
    int rank = 0, columns = 1;
    for (unsigned i = 0; i < projections; ++i) {
      rank = max(rank, arguments.projections[i].rank);
      columns = max(columns, arguments.projections[i].out_features);
    }
    const int s_row = (rank + kRun - 1) / kRun * kRun;
    const dim3 grid(tiles, unsigned((columns - 1) / kColumns + 1), projections);
    const auto kernel = aligned ? expand<X, W, true> : expand<X, W, false>;
    kernel<<<grid, kThreads, kTileRows * s_row * sizeof(float), stream>>>(arguments, s_row);
  }

  template <class X>
  void run(const Kinds& kinds) const {
    if (kinds.a == kinds.x) {
      run_shrink<X, X>(kinds.a_aligned);
    } else {
      run_shrink<X, float>(kinds.a_aligned);
    }
    if (kinds.b == kinds.x) {
      run_expand<X, X>(kinds.b_aligned);
    } else {
      run_expand<X, float>(kinds.b_aligned);
    }
  }
};

} // namespace

const char* launch(const Arguments& arguments, int64_t tiles, int projections, const Kinds& kinds,
                   void* stream) {
  const Launch both{arguments, unsigned(tiles), unsigned(projections),
                    static_cast<cudaStream_t>(stream)};
  switch (kinds.x) {
    case Type::kFloat:
      both.run<float>(kinds);
      break;
    case Type::kHalf:
      both.run<__half>(kinds);
      break;
    case Type::kBFloat16:
      both.run<__nv_bfloat16>(kinds);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

} // namespace pelt_fast::multi_lora
