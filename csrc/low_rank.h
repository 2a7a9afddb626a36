// The low-rank half of a LoRA group: everything around the base product.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "low_rank_kernels.h"
#include "philox.h"

namespace aletheia {

namespace low_rank {

// The inner loops for the instruction set in use.
const KernelSet& kernel_set();

template <typename T>
const Kernels<T>& kernels_of(const KernelSet& set) {
  if constexpr (std::is_same_v<T, float>) {
    return set.of_float;
  } else {
    return set.of_bfloat16;
  }
}

// Whether to call the functions below for x in this dtype. They run on the instruction set in use.
bool serves(at::ScalarType dtype);

// h [tokens, Σ r_i] float32 = dropout(x) Aᵀ, and y_i += s_i h_i B_iᵀ.
void forward(
    const at::Tensor& x, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    const std::optional<Dropout>& dropout, at::TensorList ys, at::Tensor& h);

// g [tokens, Σ r_i] in x's dtype = s_i dy_i B_i side by side, dA_i and dB_i, in one pass over every dy and x.
void backward(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h, at::TensorList lora_Bs,
    at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout, at::Tensor& g, at::TensorList dAs,
    at::TensorList dBs);

// dA_i and dB_i alone, from g [tokens, Σ r_i] in float32, without dropout.
void weight_gradients(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h, const at::Tensor& g, at::ArrayRef<double> scalings,
    at::TensorList dAs, at::TensorList dBs);

// dx += mask ⊙ (g A) / (1 - p), for A the stacked lora_As.
void add_input_gradient(
    const at::Tensor& g, at::TensorList lora_As, const std::optional<Dropout>& dropout, at::Tensor& dx);

}  // namespace low_rank
}  // namespace aletheia
