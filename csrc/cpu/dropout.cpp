#include "dropout.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/MT19937RNGEngine.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "../check.h"
#include "memory.h"
#include "shape.h"

namespace pelt_fast {
namespace {

constexpr int kWords = at::MERSENNE_STATE_N, kAhead = at::MERSENNE_STATE_M;

uint32_t twist(uint32_t u, uint32_t v) {
  return (((u & at::UMASK) | (v & at::LMASK)) >> 1) ^ (-(v & 1) & at::MATRIX_A);
}

// The next 624 words of the generator, untempered, in the place of the last.
void refill(uint32_t* s) {
  for (int i = 0; i < kWords - kAhead; ++i) s[i] = s[i + kAhead] ^ twist(s[i], s[i + 1]);
  // reads what the first loop and this one wrote, 227 words ago
#pragma GCC ivdep
  for (int i = kWords - kAhead; i < kWords - 1; ++i)
    s[i] = s[i + kAhead - kWords] ^ twist(s[i], s[i + 1]);
  s[kWords - 1] = s[kAhead - 1] ^ twist(s[kWords - 1], s[0]);
}

uint32_t temper(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680;
  y ^= (y << 15) & 0xefc60000;
  return y ^ (y >> 18);
}

// torch's draw of an element takes two words, of which 53 bits are a number u in [0, 1): kept where
// u < keep. The upper 21 of them, of the first word, settle all but one in two million.
struct Draw {
  static constexpr uint32_t kUpper = (uint32_t(1) << 21) - 1;
  uint64_t below; // of 2^53

  explicit Draw(double keep) : below(uint64_t(std::ceil(keep * 0x1p53))) {}
  uint8_t one(uint32_t first, uint32_t second) const {
    return ((uint64_t(temper(first) & kUpper) << 32) | temper(second)) < below;
  }
  void many(int64_t n, const uint32_t* words, uint8_t* mask) const {
    const int32_t limit = int32_t(below >> 32);
    int32_t ties = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t upper = int32_t(temper(words[2 * i]) & kUpper);
      mask[i] = upper < limit;
      ties |= upper == limit;
    }
    for (int64_t i = 0; ties && i < n; ++i) mask[i] = one(words[2 * i], words[2 * i + 1]);
  }
};

void draw(at::CPUGeneratorImpl& generator, int64_t n, double keep, uint8_t* mask) {
  const std::lock_guard<std::mutex> lock(generator.mutex_);
  at::mt19937 engine = generator.engine();
  at::mt19937_data_pod data = engine.data();
  uint32_t* const words = data.state_.data();
  const Draw rule(keep);
  // words from `next` on are left; torch counts them, and one more
  int64_t next = data.left_ == 1 ? kWords : data.next_;
  while (n > 0) {
    if (next == kWords) refill(words), next = 0;
    const int64_t count = std::min(n, (kWords - next) / 2);
    rule.many(count, words + next, mask);
    mask += count, n -= count, next += 2 * count;
    if (n > 0 && next == kWords - 1) { // the next element's words lie on both sides of a refill
      const uint32_t first = words[next];
      refill(words), next = 1;
      *mask++ = rule.one(first, words[0]), --n;
    }
  }
  data.next_ = uint32_t(next);
  data.left_ = int(kWords + 1 - next);
  engine.set_data(data);
  generator.set_engine(engine);
}

bool agrees() {
  constexpr int64_t n = 2000; // several refills
  constexpr double keep = 0.7;
  auto theirs = at::detail::createCPUGenerator(20), ours = at::detail::createCPUGenerator(20);
  at::Tensor expected = at::empty({n}, at::kFloat);
  std::vector<uint8_t> mask(n);
  for (int odd = 0; odd < 2; ++odd) {
    expected.bernoulli_(keep, theirs);
    draw(*at::check_generator<at::CPUGeneratorImpl>(ours), n, keep, mask.data());
    for (int64_t i = 0; i < n; ++i)
      if (expected.const_data_ptr<float>()[i] != float(mask[size_t(i)])) return false;
    // the same words come next; and then an odd number of them has been taken
    if (at::check_generator<at::CPUGeneratorImpl>(theirs)->random() !=
        at::check_generator<at::CPUGeneratorImpl>(ours)->random())
      return false;
  }
  return true;
}

} // namespace

bool draws_as_torch() {
  static const bool same = agrees();
  return same;
}

at::Tensor draw_mask(int64_t n, double keep) {
  at::Tensor mask = at::empty({n}, at::kByte);
  draw(*at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator()), n, keep,
       mask.mutable_data_ptr<uint8_t>());
  return mask;
}

at::Tensor masked(const at::Tensor& x, const at::Tensor& mask, double keep) {
  check_memory("x", x);
  check_memory("mask", mask);
  const at::Tensor rows = to_rows(x).contiguous();
  at::Tensor y = empty_rows(rows.size(0), rows.size(1), rows.options());
  const float scale = 1.0f / float(keep);
  const float* const from = rows.const_data_ptr<float>();
  const uint8_t* const kept = mask.const_data_ptr<uint8_t>();
  float* const to = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows.numel(), 16384, [&](int64_t begin, int64_t end) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) to[i] = from[i] * (float(kept[i]) * scale);
  });
  return from_rows(y, x);
}

} // namespace pelt_fast
