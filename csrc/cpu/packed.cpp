#include "packed.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <array>
#include <cstring>
#include <list>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "../check.h"
#include "fork.h"

namespace pelt_fast {
namespace {

template <int pair, class U>
void fill_strip(const U* source, int64_t n, int64_t k, int64_t stride_n, int64_t stride_k,
                int64_t strip, int64_t k_padded, U* out) {
  const int64_t columns = std::min(n, strip);
  if (columns < strip || k < k_padded) std::fill_n(out, strip * k_padded, U(0));
  // blocks of rows of k: whichever of the two strides is 1, its run stays in cache
  for (int64_t k0 = 0; k0 < k; k0 += 64) {
    const int64_t k1 = std::min(k0 + 64, k);
    if (pair == 1 && stride_n == 1) {
      for (int64_t i = k0; i < k1; ++i)
        std::copy_n(source + i * stride_k, columns, out + i * strip);
      continue;
    }
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = k0; i < k1; ++i)
        out[(i / pair) * strip * pair + j * pair + i % pair] = source[j * stride_n + i * stride_k];
  }
}

template <class U>
void fill(const U* source, int64_t stride_n, int64_t stride_k, int64_t pair, const Packed& pack,
          U* out) {
  const auto fill_one = pair == 1 ? fill_strip<1, U> : fill_strip<2, U>;
  const int64_t strip = pack.strip, size = strip * pack.k_padded;
  const int64_t grain = std::max<int64_t>(1, 65536 / size);
  at::parallel_for(0, pack.strips(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      fill_one(source + s * strip * stride_n, pack.n - s * strip, pack.k, stride_n, stride_k, strip,
               pack.k_padded, out + s * size);
  });
}

std::shared_ptr<const Packed> make(const at::Tensor& source, at::ScalarType dtype, int64_t strip,
                                   int64_t pair, int64_t k_unit) {
  const at::Tensor from = source.detach().to(dtype);
  auto pack = std::make_shared<Packed>();
  pack->n = from.size(0);
  pack->k = from.size(1);
  pack->strip = strip;
  pack->k_padded = (pack->k + k_unit - 1) / k_unit * k_unit;
  pack->data = at::empty({pack->strips() * strip * pack->k_padded}, from.options());
  // only bits move, so the width of an element is all that matters
  const void* bits = from.const_data_ptr();
  void* out = pack->data.mutable_data_ptr();
  switch (from.element_size()) {
    case 2:
      fill(static_cast<const uint16_t*>(bits), from.stride(0), from.stride(1), pair, *pack,
           static_cast<uint16_t*>(out));
      break;
    case 4:
      fill(static_cast<const uint32_t*>(bits), from.stride(0), from.stride(1), pair, *pack,
           static_cast<uint32_t*>(out));
      break;
    default:
      fill(static_cast<const uint64_t*>(bits), from.stride(0), from.stride(1), pair, *pack,
           static_cast<uint64_t*>(out));
  }
  return pack;
}

constexpr int64_t kWhole = 1 << 18;

// Whether the fingerprint of a tensor is of all its bytes.
bool is_read_whole(const at::Tensor& t, bool trained) {
  return (trained || int64_t(t.nbytes()) <= kWhole) && t.is_non_overlapping_and_dense();
}

uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0xD6E8FEB86659FD93ull;
  return hash ^ hash >> 32;
}

// Of all bytes, in lanes that do not wait for each other.
uint64_t hash_of(const char* bytes, int64_t size) {
  constexpr int kLanes = 8;
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = 0x9E3779B97F4A7C15ull * uint64_t(2 * i + 1);
  const char* const end = bytes + size;
  for (; end - bytes >= 8 * kLanes; bytes += 8 * kLanes) {
    uint64_t words[kLanes];
    std::memcpy(words, bytes, sizeof words);
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = mixed(lanes[lane], words[lane]);
  }
  for (; bytes < end; bytes += std::min<int64_t>(8, end - bytes)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, size_t(std::min<int64_t>(8, end - bytes)));
    lanes[0] = mixed(lanes[0], word);
  }
  uint64_t hash = 0;
  for (uint64_t lane : lanes) hash = (hash ^ lane) * 0x9E3779B97F4A7C15ull ^ (hash >> 29);
  return hash;
}

// What the contents look like: all bytes of a small tensor and of one that is trained, which
// optimizers may write through .data; of a large frozen one a walk that meets every row and every
// column. It finds what the version counter does not see: changes through .data or
// through memory shared with NumPy. A change of a few elements of a large weight on that road can
// escape it.
uint64_t fingerprint(const at::Tensor& t, bool trained) {
  const auto* bytes = static_cast<const char*>(t.const_data_ptr());
  const int64_t width = t.element_size(), rows = t.size(0), columns = t.size(1),
                count = rows * columns, down = t.stride(0), right = t.stride(1);
  if (is_read_whole(t, trained)) return hash_of(bytes, count * width);
  int64_t step =
      columns * 5 / 8 | 1; // far from its neighbour, and coprime so that every column comes up
  while (std::gcd(step, columns) != 1) ++step;
  step %= columns;
  const int64_t samples = std::max(rows, columns);
  uint64_t hash = 0x9E3779B97F4A7C15ull;
  // no division between the samples: most of their time is waiting for memory, for many at once
  for (int64_t i = 0, row = 0, column = 0; i < samples; ++i) {
    uint64_t word = 0;
    const char* from = bytes + (row * down + column * right) * width;
    if (width == 4)
      std::memcpy(&word, from, 4);
    else
      std::memcpy(&word, from, size_t(width));
    hash = mixed(hash, word);
    if (++row == rows) row = 0;
    if ((column += step) >= columns) column -= columns;
  }
  return hash;
}

struct Key {
  const void* storage;
  std::array<int64_t, 8>
      numbers; // offset, sizes, strides, source dtype and dtype, strip, pair and unit
  bool operator==(const Key& other) const = default;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = reinterpret_cast<uintptr_t>(key.storage);
    for (int64_t n : key.numbers) hash = (hash ^ uint64_t(n)) * 0x9E3779B97F4A7C15ull;
    return size_t(hash ^ (hash >> 29));
  }
};

struct Entry {
  Key key;
  c10::weak_intrusive_ptr<c10::StorageImpl> alive;
  const void* address;
  int64_t version;
  uint64_t contents;
  std::shared_ptr<const Packed> pack;
};

class Cache {
 public:
  std::shared_ptr<const Packed> get(const at::Tensor& source, at::ScalarType dtype, int64_t strip,
                                    int64_t pair, int64_t k_unit, bool trained, bool ours,
                                    bool in_room) {
    // an inference tensor counts no versions: what is not read whole could change unseen
    if (source.is_inference() && !is_read_whole(source, trained))
      return in_room ? nullptr : make(source, dtype, strip, pair, k_unit);
    c10::StorageImpl* storage = source.storage().unsafeGetStorageImpl();
    const Key key{storage,
                  {source.storage_offset(), source.size(0), source.size(1), source.stride(0),
                   source.stride(1), int64_t(source.scalar_type()) * 256 + int64_t(dtype), strip,
                   pair * 4096 + k_unit}};
    const void* address = source.const_data_ptr();
    const int64_t version = source.is_inference() ? 0 : int64_t(source._version());
    uint64_t contents = ours ? 0 : fingerprint(source, trained);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = index_.find(key);
      if (found != index_.end()) {
        Entry& entry = *found->second;
        if (entry.address == address && entry.version == version &&
            (ours || entry.contents == contents) && !entry.alive.expired()) {
          entries_.splice(entries_.begin(), entries_, found->second);
          return entry.pack;
        }
      }
    }
    if (in_room && bytes() + source.numel() * int64_t(c10::elementSize(dtype)) > limit())
      return nullptr;
    auto pack = make(source, dtype, strip, pair,
                     k_unit); // outside the lock: it takes long and uses other threads
    if (ours) contents = fingerprint(source, trained); // for who asks for it as another's
    std::lock_guard<std::mutex> lock(mutex_);
    forget_freed();
    auto found = index_.find(key);
    if (found != index_.end()) erase(found->second);
    const int64_t size = int64_t(pack->data.nbytes());
    if (size > limit_) return pack;
    while (bytes_ + size > limit_) erase(std::prev(entries_.end()));
    entries_.push_front(
        {key, c10::weak_intrusive_ptr<c10::StorageImpl>(source.storage().getWeakStorageImpl()),
         address, version, contents, pack});
    index_[key] = entries_.begin();
    bytes_ += size;
    return pack;
  }

  std::mutex& mutex() { return mutex_; }

  int64_t bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    forget_freed();
    return bytes_;
  }

  int64_t limit() {
    std::lock_guard<std::mutex> lock(mutex_);
    return limit_;
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.clear();
    index_.clear();
    bytes_ = 0;
  }

  void set_limit(int64_t limit) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = limit;
    while (bytes_ > limit_) erase(std::prev(entries_.end()));
  }

 private:
  using Entries = std::list<Entry>; // most recently used first

  void erase(Entries::iterator entry) {
    bytes_ -= int64_t(entry->pack->data.nbytes());
    index_.erase(entry->key);
    entries_.erase(entry);
  }

  void forget_freed() {
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      auto next = std::next(entry);
      if (entry->alive.expired()) erase(entry);
      entry = next;
    }
  }

  std::mutex mutex_;
  Entries entries_;
  std::unordered_map<Key, Entries::iterator, KeyHash> index_;
  int64_t bytes_ = 0, limit_ = int64_t(4096) << 20;
};

Cache& cache() {
  static Cache* const cache = [] {
    auto* made = new Cache; // never destroyed: tensors may outlive the library's statics
    free_across_forks(made->mutex());
    return made;
  }();
  return *cache;
}

} // namespace

std::shared_ptr<const Packed> packed(const at::Tensor& source, at::ScalarType dtype, int64_t strip,
                                     int64_t pair, int64_t k_unit, bool trained, bool ours) {
  return cache().get(source, dtype, strip, pair, k_unit, trained, ours, false);
}

std::shared_ptr<const Packed> packed_in_room(const at::Tensor& source, at::ScalarType dtype,
                                             int64_t strip, int64_t pair, int64_t k_unit) {
  return cache().get(source, dtype, strip, pair, k_unit, false, false, true);
}

std::optional<uint64_t> fingerprint_of(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> matrices;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_cpu()) return std::nullopt;
    matrices.push_back(tensor.reshape({-1, tensor.dim() ? tensor.size(-1) : 1}));
    check_memory("a parameter", matrices.back());
    if (tensor.is_inference() && !is_read_whole(matrices.back(), false)) return std::nullopt;
  }
  const int64_t count = int64_t(tensors.size());
  std::vector<uint64_t> contents(tensors.size());
  // their time is waiting for memory, for which threads can wait side by side
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      contents[size_t(i)] = fingerprint(matrices[size_t(i)], false);
  });
  uint64_t hash = 0x9E3779B97F4A7C15ull;
  const auto mix = [&](uint64_t word) { hash = mixed(hash, word); };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = matrices[i];
    mix(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
    mix(uint64_t(tensors[i].is_inference() ? 0 : tensors[i]._version()));
    for (int64_t j = 0; j < 2; ++j) {
      mix(uint64_t(t.size(j)));
      mix(uint64_t(t.stride(j)));
    }
    mix(uint64_t(t.scalar_type()));
    mix(contents[i]);
  }
  return hash;
}

int64_t packed_bytes() {
  return cache().bytes();
}

void clear_packed() {
  cache().clear();
}

void set_packed_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "bytes is ", bytes, "; expected at least 0");
  cache().set_limit(bytes);
}

} // namespace pelt_fast
