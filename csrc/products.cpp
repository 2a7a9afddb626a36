#include "products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "fixed_point.h"

namespace aletheia {
namespace {

bool in_fixed_point(const at::Tensor& x) { return fixed_point::serves(x.scalar_type(), x.size(0)); }

}  // namespace

bool has_products(const at::Tensor& x) { return in_fixed_point(x) || has_vendor_products(x.scalar_type()); }

std::vector<at::Tensor> linears(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases) {
  std::vector<at::Tensor> ys;
  if (!in_fixed_point(x)) {
    for (size_t i = 0; i < weights.size(); ++i) ys.push_back(at::linear(x, weights[i], biases.get(i)));
    return ys;
  }
  const auto left = fixed_point::rounded(x);
  std::vector<fixed_point::Sum> sums;
  for (size_t i = 0; i < weights.size(); ++i) {
    ys.push_back(at::empty({x.size(0), weights[i].size(0)}, x.options()));
    sums.push_back({{left}, {weights[i].t()}, biases.get(i), ys.back()});
  }
  fixed_point::multiply(sums);
  return ys;
}

at::Tensor sum_of_products(at::TensorList lefts, at::TensorList rights) {
  if (in_fixed_point(lefts[0])) {
    at::Tensor out = at::empty({lefts[0].size(0), rights[0].size(1)}, lefts[0].options());
    std::vector<std::shared_ptr<const fixed_point::Left>> all_rounded;
    for (const at::Tensor& left : lefts) all_rounded.push_back(fixed_point::rounded(left));
    fixed_point::multiply({fixed_point::Sum{std::move(all_rounded), rights.vec(), std::nullopt, out}});
    return out;
  }
  at::Tensor out = at::mm(lefts[0], rights[0]);
  for (size_t i = 1; i < lefts.size(); ++i) out.addmm_(lefts[i], rights[i]);
  return out;
}

void linear_out(at::Tensor& out, const at::Tensor& h, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (in_fixed_point(h)) {
    fixed_point::multiply({fixed_point::Sum{{fixed_point::rounded(h)}, {weight.t()}, bias, out}});
  } else if (bias.has_value()) {
    at::addmm_out(out, *bias, h, weight.t());
  } else {
    at::mm_out(out, h, weight.t());
  }
}

void product_out(at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  if (in_fixed_point(left)) {
    fixed_point::multiply({fixed_point::Sum{{fixed_point::rounded(left)}, {right}, std::nullopt, out}});
  } else {
    at::mm_out(out, left, right);
  }
}

}  // namespace aletheia
