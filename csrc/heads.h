// Queries, keys or values as attention reads them: by batch, head and token, whatever the order in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace aletheia {
namespace {

// Strided [batch, heads, tokens, features] with unit last stride.
template <typename T>
struct Heads {
  const T* data;
  int64_t batch, head, row;
  explicit Heads(const at::Tensor& t)
      : data(t.const_data_ptr<T>()), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)) {}
  const T* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * row; }
};

at::Tensor with_unit_features(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

}  // namespace
}  // namespace aletheia
