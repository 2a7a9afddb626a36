// What stands between the products of a gated MLP, each direction one pass over memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "operators.h"

namespace aletheia {

// act(gate) ⊙ up, contiguous and of one shape and floating dtype, as all here.
at::Tensor gated(const at::Tensor& gate, const at::Tensor& up, Activation activation);

// dgate and dup for the gradient of that product.
std::pair<at::Tensor, at::Tensor> gated_backward(
    const at::Tensor& dproduct, const at::Tensor& gate, const at::Tensor& up, Activation activation);

}  // namespace aletheia
