#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <limits>
#include <list>
#include <map>
#include <mutex>
#include <new>

#include "fork.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pelt_fast {
namespace {

constexpr size_t kUnit = size_t(1) << 12;  // sizes are multiples of it
constexpr size_t kHuge = size_t(2) << 20;  // a huge page
constexpr size_t kLarge = size_t(1) << 16; // from here on: below, the C library keeps blocks itself

struct Block {
  void* memory;
  size_t bytes;
};

class Pool final : public c10::Allocator {
  using ByAge = std::list<Block*>; // the last freed first
  using BySize = std::multimap<size_t, ByAge::iterator>;

 public:
  c10::DataPtr allocate(size_t wanted) override {
    const c10::Device cpu(c10::kCPU);
    if (wanted == 0) return {nullptr, cpu}; // a storage that was resized to nothing
    const size_t bytes = (wanted + kUnit - 1) / kUnit * kUnit;
    Block* block = reuse(bytes);
    if (!block) block = new Block{fresh(bytes), bytes};
    return {block->memory, block, &Pool::give_back, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  } // the context is not the memory
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }

  std::mutex& mutex() { return mutex_; }

  int64_t kept() {
    std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(bytes_);
  }
  void limit(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink();
  }
  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t limit = limit_;
    limit_ = 0;
    shrink();
    limit_ = limit;
  }

 private:
  // The smallest block that fits and is not a quarter too large.
  Block* reuse(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_size_.lower_bound(bytes);
    if (found == by_size_.end() || found->first > bytes + bytes / 4) return nullptr;
    Block* block = *found->second;
    forget(found);
    return block;
  }

  static void* fresh(size_t bytes) {
    // on the boundary of a huge page: one fault then maps 2 MiB instead of 4 KiB
    void* memory = std::aligned_alloc(bytes >= kHuge ? kHuge : 64,
                                      bytes >= kHuge ? (bytes + kHuge - 1) / kHuge * kHuge : bytes);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // advice only: where the system refuses, nothing changes
    if (bytes >= kHuge) (void)madvise(memory, bytes / kHuge * kHuge, MADV_HUGEPAGE);
#endif
    return memory;
  }

  static void give_back(void* context);

  void keep(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    by_age_.push_front(block);
    by_size_.emplace(block->bytes, by_age_.begin());
    bytes_ += block->bytes;
    shrink();
  }

  void shrink() {
    while (bytes_ > limit_) {
      Block* block = by_age_.back();
      auto it = by_size_.lower_bound(block->bytes);
      while (*it->second != block) ++it;
      forget(it);
      std::free(block->memory);
      delete block;
    }
  }

  void forget(BySize::iterator it) {
    bytes_ -= it->first;
    by_age_.erase(it->second);
    by_size_.erase(it);
  }

  std::mutex mutex_;
  ByAge by_age_;
  BySize by_size_;
  size_t bytes_ = 0, limit_ = size_t(1) << 30;
};

// Never destroyed: tensors may outlive every other static.
Pool& pool() {
  static Pool* const pool = [] {
    auto* made = new Pool;
    free_across_forks(made->mutex());
    return made;
  }();
  return *pool;
}

void Pool::give_back(void* context) {
  pool().keep(static_cast<Block*>(context));
}

} // namespace

at::Tensor empty_rows(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const size_t bytes = size_t(rows * columns) * options.dtype().itemsize();
  if (bytes < kLarge) return at::empty({rows, columns}, options);
  at::Tensor out = at::detail::empty_generic({rows, columns}, &pool(),
                                             c10::DispatchKeySet(c10::DispatchKey::CPU),
                                             c10::typeMetaToScalarType(options.dtype()), {});
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    out.fill_(std::numeric_limits<double>::quiet_NaN());
  return out;
}

int64_t pooled_bytes() {
  return pool().kept();
}
void clear_pool() {
  pool().clear();
}
void set_pool_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "bytes is ", bytes, "; expected at least 0");
  pool().limit(size_t(bytes));
}

} // namespace pelt_fast
