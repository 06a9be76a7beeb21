#include "isa.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <atomic>

namespace pelt_fast {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "amx", "amx_emulated"};

Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Isa found = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kDefault;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return Isa::kAvx2;
    // what torch's brgemm takes paired bf16 on
    return at::native::cpublas::could_pack(at::kBFloat16) ? Isa::kAmx : Isa::kAvx512;
  }();
  return found;
#else
  return Isa::kDefault;
#endif
}

std::atomic<int> asked{-1};

} // namespace

Isa current_isa() {
  int isa = asked.load(std::memory_order_relaxed);
  return isa < 0 ? best() : static_cast<Isa>(isa);
}

std::string isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

std::vector<std::string> available_isas() {
  return {kNames, kNames + static_cast<int>(best()) + 1};
}

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(Isa::kAmxEmulated); ++i) {
    if (name == kNames[i] &&
        (i <= static_cast<int>(best()) || i == static_cast<int>(Isa::kAmxEmulated))) {
      asked.store(i, std::memory_order_relaxed);
      return;
    }
  }
  std::string known;
  for (const auto& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  TORCH_CHECK_VALUE(false, "instruction set '", name, "' cannot be used here; this machine has ",
                    known);
}

} // namespace pelt_fast
