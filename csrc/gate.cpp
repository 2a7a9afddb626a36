#include "gate.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <type_traits>

#include "clones.h"
#include "convert.h"
#include "exponential.h"

namespace aletheia {
namespace {

constexpr int64_t kGrain = 8192;

template <typename W>
struct Activated {
  W value, slope;
};

// silu(v) = v σ(v), slope σ + v σ (1 - σ). gelu_tanh(v) = v σ(2u), u = √(2/π) (v + 0.044715 v³), since
// (1 + tanh u) / 2 = σ(2u); slope σ + v σ (1 - σ) 2u'. By e = exp(-|t|), σ(t) is 1 / (1 + e), or e / (1 + e) for t < 0.
template <Activation kActivation, typename W>
inline Activated<W> activate(W v) {
  W argument = v, inner_slope = 1;
  if constexpr (kActivation == Activation::kGeluTanh) {
    const W c = static_cast<W>(1.5957691216057308), square = v * v;  // 2 √(2/π)
    argument = c * v * (square * static_cast<W>(0.044715) + 1);
    inner_slope = c * (square * static_cast<W>(3 * 0.044715) + 1);
  }
  const W e = exp_nonpositive(-std::abs(argument)), inverse = 1 / (1 + e);
  const W sigma = argument < 0 ? e * inverse : inverse, rest = argument < 0 ? inverse : e * inverse;
  const W value = v * sigma;
  return {value, sigma + value * rest * inner_slope};
}

template <typename T, Activation kActivation>
ALETHEIA_CLONES void gated_range(const T* gate, const T* up, T* product, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    product[i] = from_wide<T>(activate<kActivation>(to_wide(gate[i])).value * to_wide(up[i]));
}

template <typename T, Activation kActivation>
ALETHEIA_CLONES void backward_range(
    const T* dproduct, const T* gate, const T* up, T* dgate, T* dup, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Activated<Wide<T>> active = activate<kActivation>(to_wide(gate[i]));
    const Wide<T> d = to_wide(dproduct[i]);
    dgate[i] = from_wide<T>(d * to_wide(up[i]) * active.slope);
    dup[i] = from_wide<T>(d * active.value);
  }
}

// body(T{}, std::integral_constant of the activation, first, count) on every thread's share of the elements.
template <typename Body>
void each_range(const at::Tensor& like, Activation activation, Body body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "aletheia_gate", [&] {
    at::parallel_for(0, like.numel(), kGrain, [&](int64_t first, int64_t last) {
      if (activation == Activation::kSilu) {
        body(scalar_t{}, std::integral_constant<Activation, Activation::kSilu>{}, first, last - first);
      } else {
        body(scalar_t{}, std::integral_constant<Activation, Activation::kGeluTanh>{}, first, last - first);
      }
    });
  });
}

}  // namespace

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up, Activation activation) {
  at::Tensor product = at::empty_like(gate);
  each_range(gate, activation, [&]<typename T>(T, auto kind, int64_t first, int64_t count) {
    gated_range<T, decltype(kind)::value>(
        gate.const_data_ptr<T>() + first, up.const_data_ptr<T>() + first, product.mutable_data_ptr<T>() + first, count);
  });
  return product;
}

std::pair<at::Tensor, at::Tensor> gated_backward(
    const at::Tensor& dproduct, const at::Tensor& gate, const at::Tensor& up, Activation activation) {
  at::Tensor dgate = at::empty_like(gate), dup = at::empty_like(up);
  each_range(gate, activation, [&]<typename T>(T, auto kind, int64_t first, int64_t count) {
    backward_range<T, decltype(kind)::value>(
        dproduct.const_data_ptr<T>() + first, gate.const_data_ptr<T>() + first, up.const_data_ptr<T>() + first,
        dgate.mutable_data_ptr<T>() + first, dup.mutable_data_ptr<T>() + first, count);
  });
  return {dgate, dup};
}

}  // namespace aletheia
