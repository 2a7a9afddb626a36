// Elements to the dtype that sums are carried in and back, branch-free, so that loops around them vectorise.
#pragma once

#include <ATen/core/Tensor.h>

#include <bit>
#include <cstdint>
#include <type_traits>

namespace aletheia {

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline Wide<T> to_wide(T value) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    return std::bit_cast<float>(uint32_t{value.x} << 16);
  } else {
    return static_cast<Wide<T>>(value);
  }
}

// Round to nearest even. Nothing is done for a NaN: it keeps the upper half that makes it one, because its lower half is
// zero, whether it came from a bfloat16 operand or from the processor, and adding 0x7fff to zero carries nothing. (A
// float32 operand may hold a NaN of another payload, which no computation makes.)
template <typename T>
inline T from_wide(Wide<T> value) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    return at::BFloat16(static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16), at::BFloat16::from_bits());
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace aletheia
