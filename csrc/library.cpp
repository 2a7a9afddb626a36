// Schemas of the CPU operators and what the processor offers.
#include <torch/library.h>

#include <string>

#include "instruction_set.h"
#include "operators.h"

namespace {

// How many of aletheia_kernels.cpu.INSTRUCTION_SETS, beyond the baseline and in that order, the processor offers.
int64_t features() { return static_cast<int64_t>(aletheia::offered_instruction_set()); }

std::string instruction_set() { return aletheia::name_of(aletheia::instruction_set()); }

}  // namespace

TORCH_LIBRARY(aletheia_cpu, m) {
  m.def("features() -> int", &features);
  m.def("instruction_set() -> str", &instruction_set);
  m.def("use_instruction_set(str name) -> ()", &aletheia::use_instruction_set);
  m.def("tune_allocator() -> bool", &aletheia::tune_allocator);
  m.def(
      "lora_group_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs,"
      " float[] scalings, float dropout_p, Tensor? seed) -> (Tensor[], Tensor)");
  m.def(
      "lora_group_backward(Tensor[] dys, Tensor x, Tensor h, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs,"
      " float[] scalings, float dropout_p, Tensor? seed, bool needs_dx) -> (Tensor, Tensor[], Tensor[])");
  m.def(
      "lora_gated_mlp_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs,"
      " float[] scalings, str activation) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_gated_mlp_backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor h, Tensor[] weights,"
      " Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings, str activation, bool needs_dx)"
      " -> (Tensor, Tensor[], Tensor[])");
  m.def("weight_grad_norm_sq(Tensor x, Tensor dy, str method) -> Tensor");
  m.def("weight_grad_norms_sq(Tensor[] xs, Tensor[] dys) -> Tensor");
  m.def("weight_grad_norm_sq_per_example(Tensor x, Tensor dy) -> Tensor");
  m.def("weight_grad_norm_sq_sketch(Tensor x, Tensor dy, Tensor omega) -> (Tensor, Tensor)");
  m.def("embedding_grad_norm_sq(Tensor indices, Tensor dy) -> Tensor");
  m.def("bias_grad_norm_sq(Tensor dy) -> Tensor");
  m.def(
      "linear_cross_entropy_forward(Tensor h, Tensor weight, Tensor? bias, Tensor labels, float softcap,"
      " float label_smoothing, bool needs_dh) -> (Tensor, Tensor)");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor first, Tensor last,"
      " float scale) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps, float offset, bool rounds_first) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, bool needs_dx,"
      " bool needs_dweight) -> (Tensor, Tensor)");
  m.def("rotary_forward(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
  m.def("rotary_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(aletheia_cpu, CPU, m) {
  m.impl("lora_group_forward", &aletheia::lora_group_forward);
  m.impl("lora_group_backward", &aletheia::lora_group_backward);
  m.impl("lora_gated_mlp_forward", &aletheia::lora_gated_mlp_forward);
  m.impl("lora_gated_mlp_backward", &aletheia::lora_gated_mlp_backward);
  m.impl("weight_grad_norm_sq", &aletheia::weight_grad_norm_sq);
  m.impl("weight_grad_norms_sq", &aletheia::weight_grad_norms_sq);
  m.impl("weight_grad_norm_sq_per_example", &aletheia::weight_grad_norm_sq_per_example);
  m.impl("weight_grad_norm_sq_sketch", &aletheia::weight_grad_norm_sq_sketch);
  m.impl("embedding_grad_norm_sq", &aletheia::embedding_grad_norm_sq);
  m.impl("bias_grad_norm_sq", &aletheia::bias_grad_norm_sq);
  m.impl("linear_cross_entropy_forward", &aletheia::linear_cross_entropy_forward);
  m.impl("attention_forward", &aletheia::attention_forward);
  m.impl("attention_backward", &aletheia::attention_backward);
  m.impl("rms_norm_forward", &aletheia::rms_norm_forward);
  m.impl("rms_norm_backward", &aletheia::rms_norm_backward);
  m.impl("rotary_forward", &aletheia::rotary_forward);
  m.impl("rotary_backward", &aletheia::rotary_backward);
}
