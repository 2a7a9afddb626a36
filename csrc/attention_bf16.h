// Attention over a contiguous range of keys a query, in bfloat16 products, on processors with AVX512-BF16.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace aletheia::attention_bf16 {

// Whether the instruction set in use has the functions below, and they are for this dtype.
bool serves(at::ScalarType dtype);

// As attention_forward and attention_backward of operators.h.
std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& first, const at::Tensor& last,
    double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& dO, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lse,
    const at::Tensor& first, const at::Tensor& last, double scale);

}  // namespace aletheia::attention_bf16
