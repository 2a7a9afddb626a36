// The CPU operators, as declared in library.cpp's schemas. The mathematics stands in aletheia_kernels/reference.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <vector>

namespace aletheia {

// The dtype that sums are carried in.
inline at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline at::Tensor with_unit_columns(const at::Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

// Whether this processor has instructions for products in a floating dtype; true where that is not known. Where it has
// not, operators widen their operands to float32, which is several times as quick.
bool has_vendor_products(at::ScalarType dtype);

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

inline std::vector<at::Tensor> all_to(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& tensor : tensors) out.push_back(tensor.to(dtype));
  return out;
}
inline OptionalTensors all_to(const OptionalTensors& tensors, at::ScalarType dtype) {
  OptionalTensors out;
  for (const std::optional<at::Tensor> tensor : tensors)
    out.push_back(tensor ? std::optional(tensor->to(dtype)) : std::nullopt);
  return out;
}

// Where each of the tensors begins when they are joined along a dimension, and where the last one ends.
inline std::vector<int64_t> offsets_of(at::TensorList tensors, int64_t dim) {
  std::vector<int64_t> offsets{0};
  for (const at::Tensor& tensor : tensors) offsets.push_back(offsets.back() + tensor.size(dim));
  return offsets;
}

// Whether malloc took the settings.
bool tune_allocator();

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, double dropout_p, const std::optional<at::Tensor>& seed);

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_group_backward(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h, at::TensorList weights, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, double dropout_p, const std::optional<at::Tensor>& seed,
    bool needs_dx);

enum class Activation { kSilu, kGeluTanh };

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_gated_mlp_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, c10::string_view activation);

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_gated_mlp_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& h,
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    c10::string_view activation, bool needs_dx);

at::Tensor weight_grad_norm_sq(const at::Tensor& x, const at::Tensor& dy, c10::string_view method);
at::Tensor weight_grad_norms_sq(at::TensorList xs, at::TensorList dys);
at::Tensor weight_grad_norm_sq_per_example(const at::Tensor& x, const at::Tensor& dy);
std::tuple<at::Tensor, at::Tensor> weight_grad_norm_sq_sketch(
    const at::Tensor& x, const at::Tensor& dy, const at::Tensor& omega);
at::Tensor embedding_grad_norm_sq(const at::Tensor& indices, const at::Tensor& dy);
at::Tensor bias_grad_norm_sq(const at::Tensor& dy);

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_forward(
    const at::Tensor& h, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& labels,
    double softcap, double label_smoothing, bool needs_dh);

std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& first, const at::Tensor& last,
    double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& dO, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lse,
    const at::Tensor& first, const at::Tensor& last, double scale);

std::tuple<at::Tensor, at::Tensor> rms_norm_forward(
    const at::Tensor& x, const at::Tensor& weight, double eps, double offset, bool rounds_first);
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd, double offset,
    bool needs_dx, bool needs_dweight);

std::tuple<at::Tensor, at::Tensor> rotary_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);
std::tuple<at::Tensor, at::Tensor> rotary_backward(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace aletheia
