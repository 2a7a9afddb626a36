// Gated MLP with LoRA, forward and backward (mathematics: aletheia_kernels/reference/gated_mlp.py).
//
// In bfloat16 on a processor with AVX512-BF16 one sweep over blocks of rows (fused.h); elsewhere two LoRA groups with the
// activation between them, in float32 where the processor has no products in the dtype. Either way gate and up are kept
// for backward, and their product is computed again.
#include <ATen/ops/cat.h>

#include "fused.h"
#include "gate.h"
#include "operators.h"
#include "products.h"

namespace aletheia {
namespace {

Activation activation_from(c10::string_view name) {
  TORCH_CHECK(name == "silu" || name == "gelu_tanh", "activation: expected silu or gelu_tanh, got ", name);
  return name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
}

OptionalTensors slice(const OptionalTensors& list, size_t begin, size_t end) {
  OptionalTensors out;
  for (size_t i = begin; i < end; ++i) out.push_back(list.get(i));
  return out;
}

int64_t ranks_of(at::TensorList lora_As) {
  int64_t ranks = 0;
  for (const at::Tensor& lora_A : lora_As) ranks += lora_A.size(0);
  return ranks;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_gated_mlp_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, c10::string_view activation_name) {
  const Activation activation = activation_from(activation_name);
  if (fused::serves(x, weights))
    return fused::lora_gated_mlp_forward(x, weights, biases, lora_As, lora_Bs, scalings, activation);
  const auto dtype = x.scalar_type();
  if (!has_products(x)) {
    const auto [y, gate, up, h] = lora_gated_mlp_forward(
        x.to(at::kFloat), all_to(weights, at::kFloat), all_to(biases, at::kFloat), lora_As, lora_Bs, scalings,
        activation_name);
    return {y.to(dtype), gate.to(dtype), up.to(dtype), h};
  }
  auto [gate_up, h_in] = lora_group_forward(
      x, weights.slice(0, 2), slice(biases, 0, 2), lora_As.slice(0, 2), lora_Bs.slice(0, 2), scalings.slice(0, 2), 0.0,
      std::nullopt);
  auto [ys, h_mid] = lora_group_forward(
      gated(gate_up[0], gate_up[1], activation), weights.slice(2), slice(biases, 2, 3), lora_As.slice(2),
      lora_Bs.slice(2), scalings.slice(2), 0.0, std::nullopt);
  return {ys[0], gate_up[0], gate_up[1], at::cat({h_in, h_mid}, 1)};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_gated_mlp_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gate_any, const at::Tensor& up_any, const at::Tensor& h,
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    c10::string_view activation_name, bool needs_dx) {
  const at::Tensor gate = gate_any.contiguous(), up = up_any.contiguous();
  const Activation activation = activation_from(activation_name);
  if (fused::serves(x, weights))
    return fused::lora_gated_mlp_backward(
        dy, x, gate, up, h.contiguous(), weights, lora_As, lora_Bs, scalings, activation, needs_dx);
  const auto dtype = x.scalar_type();
  if (!has_products(x)) {
    auto [dx, dAs, dBs] = lora_gated_mlp_backward(
        dy.to(at::kFloat), x.to(at::kFloat), gate.to(at::kFloat), up.to(at::kFloat), h, all_to(weights, at::kFloat),
        lora_As, lora_Bs, scalings, activation_name, needs_dx);
    return {dx.to(dtype), std::move(dAs), std::move(dBs)};
  }
  const int64_t ranks_in = ranks_of(lora_As.slice(0, 2)), ranks_mid = lora_As[2].size(0);
  const auto [dproduct, dA_mid, dB_mid] = lora_group_backward(
      {dy}, gated(gate, up, activation), h.narrow(1, ranks_in, ranks_mid), weights.slice(2), lora_As.slice(2), lora_Bs.slice(2),
      scalings.slice(2), 0.0, std::nullopt, true);
  const auto [dgate, dup] = gated_backward(dproduct, gate, up, activation);
  auto [dx, dAs, dBs] = lora_group_backward(
      {dgate, dup}, x, h.narrow(1, 0, ranks_in), weights.slice(0, 2), lora_As.slice(0, 2), lora_Bs.slice(0, 2),
      scalings.slice(0, 2), 0.0, std::nullopt, needs_dx);
  dAs.push_back(dA_mid[0]);
  dBs.push_back(dB_mid[0]);
  return {dx, std::move(dAs), std::move(dBs)};
}

}  // namespace aletheia
