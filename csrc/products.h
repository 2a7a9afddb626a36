// Products with frozen weights: in fixed point where that is quickest (fixed_point.h), else the vendor library's.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "operators.h"

namespace aletheia {

// Whether the functions below multiply x's dtype at a rate that float32 does not reach; else operators widen to it.
bool has_products(const at::Tensor& x);

// x W_iᵀ + b_i for every i.
std::vector<at::Tensor> linears(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases);

// Σ_i lefts_i rights_i.
at::Tensor sum_of_products(at::TensorList lefts, at::TensorList rights);

// out = h weightᵀ + bias.
void linear_out(at::Tensor& out, const at::Tensor& h, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// out = left right.
void product_out(at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

}  // namespace aletheia
