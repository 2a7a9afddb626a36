// LoRA group, forward and backward (mathematics: aletheia_kernels/reference/lora.py).
//
// In bfloat16 on AVX512-BF16 base and low-rank products are one (fused.h), as they are in fixed point without dropout:
// what the adapters add to a result is further inner indices of its sum. Elsewhere the base products are products.h's,
// in float32 where the processor has nothing for the dtype, and what surrounds them is low_rank.h's, or composed of
// ATen products that accumulate into the fresh outputs. Either way siblings share one shrink product and dropout is made
// again from its seed.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "clones.h"
#include "fixed_point.h"
#include "fused.h"
#include "low_rank.h"
#include "operators.h"
#include "philox.h"
#include "products.h"

namespace aletheia {
namespace {

std::optional<Dropout> dropout_from(double p, const std::optional<at::Tensor>& seed) {
  if (p == 0.0 || !seed.has_value()) return std::nullopt;
  return Dropout{
      static_cast<uint64_t>(seed->item<int64_t>()), static_cast<uint32_t>(p * 4294967296.0),
      1.0 / (1.0 - p)};
}

// out[i] (+)= keep_i ? in[i] * scale : 0 over elements [begin, end) of logically contiguous tensors; begin % 4 == 0.
template <typename T, bool kAccumulate>
ALETHEIA_CLONES void masked_range(const T* in, T* out, const Dropout& dropout, int64_t begin, int64_t end) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Wide scale = static_cast<Wide>(dropout.scale);
  for (int64_t i = begin; i < end; i += 4) {
    const PhiloxBlock block = philox(dropout.seed, static_cast<uint64_t>(i >> 2));
    const int64_t lanes = std::min<int64_t>(4, end - i);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Wide kept = block.word[lane] >= dropout.threshold ? static_cast<Wide>(in[i + lane]) * scale : Wide{0};
      out[i + lane] = static_cast<T>(kAccumulate ? static_cast<Wide>(out[i + lane]) + kept : kept);
    }
  }
}

template <bool kAccumulate>
void masked(const at::Tensor& in, at::Tensor& out, const Dropout& dropout) {
  constexpr int64_t kGrain = 16384;
  const int64_t count = in.numel(), chunks = (count + kGrain - 1) / kGrain;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "aletheia_dropout", [&] {
    const scalar_t* source = in.const_data_ptr<scalar_t>();
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      masked_range<scalar_t, kAccumulate>(
          source, target, dropout, first * kGrain, std::min(last * kGrain, count));
    });
  });
}

at::Tensor dropped(const at::Tensor& x, const std::optional<Dropout>& dropout) {
  if (!dropout) return x;
  const at::Tensor source = x.contiguous();
  at::Tensor out = at::empty_like(source);
  masked<false>(source, out, *dropout);
  return out;
}

// Whether low_rank.h does what surrounds the base products; else ATen does.
bool uses_low_rank(const at::Tensor& x, at::TensorList lora_As, at::TensorList lora_Bs) {
  const auto readable = [](const at::Tensor& t) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16;
  };
  return low_rank::serves(x.scalar_type()) && std::all_of(lora_As.begin(), lora_As.end(), readable) &&
         std::all_of(lora_Bs.begin(), lora_Bs.end(), readable);
}

at::Tensor stacked(at::TensorList lora_As, at::ScalarType dtype) {
  int64_t rank = 0;
  for (const auto& lora_A : lora_As) rank += lora_A.size(0);
  at::Tensor shrink = at::empty({rank, lora_As[0].size(1)}, lora_As[0].options().dtype(dtype));
  int64_t row = 0;
  for (const auto& lora_A : lora_As) {
    shrink.narrow(0, row, lora_A.size(0)).copy_(lora_A);
    row += lora_A.size(0);
  }
  return shrink;
}

// s_i for each of r_i ranks, end to end, in float32.
at::Tensor scaling_of_ranks(const std::vector<int64_t>& offsets, at::ArrayRef<double> scalings) {
  at::Tensor out = at::empty({offsets.back()}, at::kFloat);
  for (size_t i = 0; i < scalings.size(); ++i)
    std::fill(
        out.mutable_data_ptr<float>() + offsets[i], out.mutable_data_ptr<float>() + offsets[i + 1],
        static_cast<float>(scalings[i]));
  return out;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> forward_in_fixed_point(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings) {
  const auto dtype = x.scalar_type();
  const std::vector<int64_t> offsets = offsets_of(lora_As, 0);
  const auto left = fixed_point::rounded(x);
  at::Tensor h = at::empty({x.size(0), offsets.back()}, x.options().dtype(at::kFloat));
  if (offsets.back() > 0)
    fixed_point::multiply({fixed_point::Sum{{left}, {stacked(lora_As, dtype).t()}, std::nullopt, h}});
  const at::Tensor scaled = h.mul(scaling_of_ranks(offsets, scalings)).to(dtype);
  std::vector<at::Tensor> ys;
  std::vector<fixed_point::Sum> sums;
  for (size_t i = 0; i < weights.size(); ++i) {
    ys.push_back(at::empty({x.size(0), weights[i].size(0)}, x.options()));
    fixed_point::Sum sum{{left}, {weights[i].t()}, biases.get(i), ys.back()};
    if (const int64_t rank = lora_As[i].size(0); rank > 0) {
      sum.lefts.push_back(fixed_point::rounded(scaled.narrow(1, offsets[i], rank)));
      sum.rights.push_back(lora_Bs[i].to(dtype).t());
    }
    sums.push_back(std::move(sum));
  }
  fixed_point::multiply(sums);
  return {std::move(ys), h};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> backward_in_fixed_point(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h, at::TensorList weights, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, bool needs_dx) {
  const auto dtype = x.scalar_type();
  const std::vector<int64_t> offsets = offsets_of(lora_As, 0);
  std::vector<std::shared_ptr<const fixed_point::Left>> lefts;
  std::vector<fixed_point::Sum> shrinks;
  std::vector<at::Tensor> dAs, dBs;
  at::Tensor g = at::empty(h.sizes(), h.options());
  for (size_t i = 0; i < dys.size(); ++i) {
    const int64_t rank = lora_As[i].size(0);
    lefts.push_back(fixed_point::rounded(dys[i]));
    if (rank > 0) shrinks.push_back({{lefts[i]}, {lora_Bs[i].to(dtype)}, std::nullopt, g.narrow(1, offsets[i], rank)});
    dAs.push_back(at::empty_like(lora_As[i], at::MemoryFormat::Contiguous));
    dBs.push_back(at::empty_like(lora_Bs[i], at::MemoryFormat::Contiguous));
  }
  if (!shrinks.empty()) {
    fixed_point::multiply(shrinks);
    g.mul_(scaling_of_ranks(offsets, scalings));
    low_rank::weight_gradients(dys, x, h, g, scalings, dAs, dBs);
  }
  if (!needs_dx) return {at::empty({0}, x.options()), std::move(dAs), std::move(dBs)};
  at::Tensor dx = at::empty(x.sizes(), x.options());
  std::vector<at::Tensor> rights = weights.vec();
  if (offsets.back() > 0) {
    lefts.push_back(fixed_point::rounded(g.to(dtype)));
    rights.push_back(stacked(lora_As, dtype));
  }
  fixed_point::multiply({fixed_point::Sum{std::move(lefts), std::move(rights), std::nullopt, dx}});
  return {dx, std::move(dAs), std::move(dBs)};
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, double dropout_p, const std::optional<at::Tensor>& seed) {
  const auto dtype = x.scalar_type();
  const auto dropout = dropout_from(dropout_p, seed);
  if (fused::serves(x, weights))
    return fused::lora_group_forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout);
  if (!has_products(x)) {
    auto [wide_ys, h] = lora_group_forward(
        x.to(at::kFloat), all_to(weights, at::kFloat), all_to(biases, at::kFloat), lora_As, lora_Bs, scalings, dropout_p,
        seed);
    return {all_to(wide_ys, dtype), h};
  }
  if (!dropout && fixed_point::serves(dtype, x.size(0)))
    return forward_in_fixed_point(x, weights, biases, lora_As, lora_Bs, scalings);
  std::vector<at::Tensor> ys = linears(x, weights, biases);
  if (uses_low_rank(x, lora_As, lora_Bs)) {
    at::Tensor h = at::empty({x.size(0), offsets_of(lora_As, 0).back()}, x.options().dtype(at::kFloat));
    low_rank::forward(x, lora_As, lora_Bs, scalings, dropout, ys, h);
    return {std::move(ys), h};
  }
  const at::Tensor h = at::mm(dropped(x, dropout), stacked(lora_As, dtype).t());
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rank = lora_As[i].size(0);
    ys[i].addmm_(h.narrow(1, column, rank), lora_Bs[i].to(dtype).t(), 1, scalings[i]);
    column += rank;
  }
  return {std::move(ys), h.to(wide(dtype))};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_group_backward(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h_any, at::TensorList weights, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, double dropout_p, const std::optional<at::Tensor>& seed,
    bool needs_dx) {
  const auto dtype = x.scalar_type();
  const at::Tensor h = h_any.contiguous();
  const auto dropout = dropout_from(dropout_p, seed);
  if (fused::serves(x, weights))
    return fused::lora_group_backward(dys, x, h, weights, lora_As, lora_Bs, scalings, dropout, needs_dx);
  if (!has_products(x)) {
    auto [dx, dAs, dBs] = lora_group_backward(
        all_to(dys, at::kFloat), x.to(at::kFloat), h, needs_dx ? all_to(weights, at::kFloat) : weights.vec(), lora_As,
        lora_Bs, scalings, dropout_p, seed, needs_dx);
    return {dx.to(dtype), std::move(dAs), std::move(dBs)};
  }
  if (!dropout && fixed_point::serves(dtype, x.size(0)))
    return backward_in_fixed_point(dys, x, h, weights, lora_As, lora_Bs, scalings, needs_dx);
  at::Tensor g = at::empty(h.sizes(), x.options());
  std::vector<at::Tensor> dAs, dBs;
  for (size_t i = 0; i < weights.size(); ++i) {
    dAs.push_back(at::empty_like(lora_As[i], at::MemoryFormat::Contiguous));
    dBs.push_back(at::empty_like(lora_Bs[i], at::MemoryFormat::Contiguous));
  }
  const bool ours = uses_low_rank(x, lora_As, lora_Bs);
  if (ours) {
    low_rank::backward(dys, x, h, lora_Bs, scalings, dropout, g, dAs, dBs);
  } else {
    const at::Tensor x_hat = dropped(x, dropout), h_narrow = h.to(dtype);
    int64_t column = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t rank = lora_As[i].size(0);
      at::Tensor g_i = g.narrow(1, column, rank);
      g_i.copy_(at::mm(dys[i], lora_Bs[i].to(dtype)).mul_(scalings[i]));
      dBs[i].copy_(at::mm(dys[i].t(), h_narrow.narrow(1, column, rank)).mul_(scalings[i]));
      dAs[i].copy_(at::mm(g_i.t(), x_hat));
      column += rank;
    }
  }
  if (!needs_dx) return {at::empty({0}, x.options()), std::move(dAs), std::move(dBs)};

  at::Tensor dx = sum_of_products(dys, weights);
  if (ours) {
    low_rank::add_input_gradient(g, lora_As, dropout, dx);
  } else if (dropout) {
    masked<true>(at::mm(g, stacked(lora_As, dtype)), dx, *dropout);
  } else {
    dx.addmm_(g, stacked(lora_As, dtype));
  }
  return {dx, std::move(dAs), std::move(dBs)};
}

}  // namespace aletheia
