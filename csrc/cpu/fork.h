// A lock that another thread holds while the process forks is held for ever in the child.
#pragma once

#include <mutex>

namespace pelt_fast {

// Takes the lock, which lives as long as the process, before each fork and frees it on both sides.
void free_across_forks(std::mutex& mutex);

} // namespace pelt_fast
