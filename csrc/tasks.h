// Work shared out among threads that take the next of it from a counter, and memory for each.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace aletheia {
namespace {

// Memory from torch's allocator: 64-byte aligned, not initialised.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) : memory_(c10::GetCPUAllocator()->allocate(std::max<int64_t>(count, 1) * sizeof(T))) {}
  T* data() const { return static_cast<T*>(memory_.get()); }
  T& operator[](int64_t index) const { return data()[index]; }

 private:
  c10::DataPtr memory_;
};

// body(take) on every thread, which takes tasks until there are none: take() gives the next one's number.
template <typename Body>
void on_threads(int64_t tasks, Body body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    body([&] { return next.fetch_add(1); });
  });
}

}  // namespace
}  // namespace aletheia
