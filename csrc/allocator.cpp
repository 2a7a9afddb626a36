// The C library's allocator, set to keep the memory that a training step frees for the next one.
#include "operators.h"

#include <cstdlib>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace aletheia {

bool tune_allocator() {
#if defined(__GLIBC__)
  struct Setting {
    const char* variable;
    int parameter, value;
  };
  constexpr Setting settings[] = {
      {"MALLOC_MMAP_MAX_", M_MMAP_MAX, 0},                // large blocks from the heap too, where they are used again
      {"MALLOC_TRIM_THRESHOLD_", M_TRIM_THRESHOLD, -1},   // an int holds no threshold of many GiB; -1 is "never"
      {"MALLOC_TOP_PAD_", M_TOP_PAD, 256 * 1024 * 1024},  // the heap grows in few, large steps
  };
  bool accepted = true;
  for (const Setting& setting : settings)
    if (std::getenv(setting.variable) == nullptr) accepted &= mallopt(setting.parameter, setting.value) == 1;
  return accepted;
#else
  return false;
#endif
}

}  // namespace aletheia
