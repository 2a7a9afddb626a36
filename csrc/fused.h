// Frozen linears with their low-rank adapters, each a sweep over blocks of rows, on processors with AVX512-BF16: base
// product and adapter in one sum, and everything a block needs done while it is in cache.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "operators.h"
#include "philox.h"

namespace aletheia {

namespace fused {

// Whether the instruction set in use has the functions below, and they pay for x of this dtype and number of rows, these
// weights and the number of threads.
bool serves(const at::Tensor& x, at::TensorList weights);

// As lora_group_forward and lora_group_backward of operators.h, which see.
std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout);
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_group_backward(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h, at::TensorList weights, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout, bool needs_dx);

// As lora_gated_mlp_forward and lora_gated_mlp_backward of operators.h.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_gated_mlp_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, Activation activation);
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_gated_mlp_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& h,
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    Activation activation, bool needs_dx);

}  // namespace fused
}  // namespace aletheia
