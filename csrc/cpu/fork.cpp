#include "fork.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pelt_fast {
namespace {

constexpr int kMost = 4;
std::mutex* locks[kMost];
int count = 0;

} // namespace

void free_across_forks(std::mutex& mutex) {
#if defined(__unix__) || defined(__APPLE__)
  static std::mutex registering;
  std::lock_guard<std::mutex> lock(registering);
  if (count == kMost) return;
  locks[count++] = &mutex;
  if (count > 1) return;
  const auto unlock = [] {
    for (int i = count; i-- > 0;) locks[i]->unlock();
  };
  pthread_atfork(
      [] {
        for (int i = 0; i < count; ++i) locks[i]->lock();
      },
      unlock, unlock);
#endif
}

} // namespace pelt_fast
