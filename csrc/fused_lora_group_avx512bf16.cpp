// LoRA group: y_i = x W_iᵀ + s_i h_i B_iᵀ as one product over in + r_i inner indices, and dx = Σ_i dy_i W_i + g A
// likewise (mathematics: aletheia_kernels/reference/lora.py).
//
// Backward, a block of rows of every dy serves g, dB and dx, and of x serves dA, before the next block is touched.
#include <ATen/ops/empty.h>

#include "fused_avx512bf16.h"
#include "instruction_set.h"

#ifdef ALETHEIA_AVX512BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia::fused {
namespace {

template <typename Visit>  // visit(element, keep) for count elements from first on
void for_words(const Dropout& dropout, int64_t first, int64_t count, Visit visit) {
  PhiloxBlock block{};
  for (int64_t k = 0; k < count; ++k) {
    const int64_t element = first + k;
    if (k == 0 || element % 4 == 0) block = philox(dropout.seed, static_cast<uint64_t>(element >> 2));
    visit(k, block.word[element % 4] >= dropout.threshold);
  }
}

// Rows of dropout(x), or of x itself.
struct Input {
  const bf16* data;
  int64_t ld, features;
  const std::optional<Dropout>& dropout;
  Scratch<bf16> scratch;

  Input(const at::Tensor& x, const std::optional<Dropout>& dropout, int64_t block)
      : data(x.const_data_ptr<bf16>()), ld(x.stride(0)), features(x.size(1)), dropout(dropout),
        scratch(dropout ? block * features : 0) {}

  std::pair<const bf16*, int64_t> rows(int64_t first, int64_t count) {
    const bf16* source = data + first * ld;
    if (!dropout) return {source, ld};
    const float scale = static_cast<float>(dropout->scale);
    for (int64_t m = 0; m < count; ++m)
      for_words(*dropout, (first + m) * features, features, [&](int64_t k, bool keep) {
        scratch[m * features + k] = static_cast<bf16>(keep ? static_cast<float>(source[m * ld + k]) * scale : 0.0f);
      });
    return {scratch.data(), features};
  }
};

}  // namespace

bool serves(const at::Tensor& x, at::TensorList weights) {
  // Packing a weight before its product costs as much as some 20 rows of it, or 80 where it leaves the cache.
  constexpr int64_t kFewestRows = 48, kFewestByUnit = 4;
  if (instruction_set() < InstructionSet::kAvx512Bf16 || x.scalar_type() != at::kBFloat16) return false;
  return x.size(0) >= (when_to_pack(x.size(0), weights) == When::kByUnit ? kFewestByUnit : kFewestRows);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_forward(
    const at::Tensor& x_any, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout) {
  const at::Tensor x = with_unit_columns(x_any);
  const int64_t tokens = x.size(0);
  const Adapters adapters(lora_As, lora_Bs, scalings);
  const When when = when_to_pack(tokens, weights);
  const PackedB shrink = adapters.stacked_A(Packing::kColumns);
  std::vector<PackedB> bases, expands;
  std::vector<Scratch<float>> starts;
  std::vector<at::Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    bases.push_back(forward_weight(weights[i], when));
    expands.push_back(adapters.B(i, Packing::kColumns));
    starts.push_back(padded_bias(biases.get(i), weights[i].size(0)));
    ys.push_back(at::empty({tokens, weights[i].size(0)}, x.options()));
  }
  std::vector<const PackedB*> jobs{&shrink};
  for (const PackedB& b : bases) jobs.push_back(&b);
  for (const PackedB& b : expands) jobs.push_back(&b);
  pack_all(jobs);

  at::Tensor h = at::empty({tokens, adapters.ranks}, x.options().dtype(at::kFloat));
  float* h_data = h.mutable_data_ptr<float>();
  const bf16* x_data = x.const_data_ptr<bf16>();
  const int64_t ld = x.stride(0), ranks = adapters.ranks;
  const Scratch<bf16> scaled(tokens * ranks);
  const Blocks blocks(tokens, rows_in_cache(x.size(1)));
  const auto to_h = [&](int64_t first, int64_t count) {
    Input input(x, dropout, blocks.size);
    const auto [x_hat, ld_hat] = input.rows(first, count);
    const Piece shrunk{x_hat, ld_hat, shrink.panels()};
    block_product(&shrunk, 1, count, ranks, nullptr, store_float(h_data + first * ranks, ranks));
    adapters.scale(h_data + first * ranks, ranks, count, scaled.data() + first * ranks);
  };
  const auto to_y = [&](size_t i, int64_t first, int64_t count, Window& window) {
    const Piece pieces[]{
        {x_data + first * ld, ld, bases[i].panels(window)},
        {scaled.data() + first * ranks + adapters.offsets[i], ranks, expands[i].panels(window)}};
    const int64_t out = ys[i].size(1);
    bf16* const y = ys[i].mutable_data_ptr<bf16>() + first * out + window.first;
    block_product(pieces, 2, count, window.count, from(starts[i], window.first), store_bfloat16(y, out));
  };
  blocks.each([&](int64_t, bool, int64_t first, int64_t count) {
    to_h(first, count);
    if (when == When::kByUnit) return;
    for (size_t i = 0; i < ys.size(); ++i) {
      Window all(ys[i].size(1));
      to_y(i, first, count, all);
    }
  });
  if (when == When::kByUnit)
    for (size_t i = 0; i < ys.size(); ++i)
      each_window(ys[i].size(1), bases[i].unit_elements(), [&](Window& window) { to_y(i, 0, tokens, window); });
  return {std::move(ys), h};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_group_backward(
    at::TensorList dys_any, const at::Tensor& x_any, const at::Tensor& h, at::TensorList weights,
    at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    const std::optional<Dropout>& dropout, bool needs_dx) {
  const at::Tensor x = with_unit_columns(x_any);
  const int64_t tokens = x.size(0), features = x.size(1);
  const Adapters adapters(lora_As, lora_Bs, scalings);
  const int64_t ranks = adapters.ranks;
  const When when = when_to_pack(tokens, weights);
  const PackedB spread = adapters.stacked_A(Packing::kRows);
  std::vector<at::Tensor> dys;
  std::vector<PackedB> bases, shrinks;
  std::vector<const PackedB*> jobs{&spread};
  std::vector<int64_t> dB_offsets{TokenSums::size(ranks, features)};
  for (size_t i = 0; i < weights.size(); ++i) {
    dys.push_back(with_unit_columns(dys_any[i]));
    shrinks.push_back(adapters.B(i, Packing::kRows));
    if (needs_dx) bases.push_back(backward_weight(weights[i], when));
    dB_offsets.push_back(dB_offsets.back() + TokenSums::size(adapters.rank(i), lora_Bs[i].size(0)));
  }
  for (const PackedB& b : bases) jobs.push_back(&b);
  for (const PackedB& b : shrinks) jobs.push_back(&b);
  pack_all(jobs);

  at::Tensor dx = needs_dx ? at::empty({tokens, features}, x.options()) : at::empty({0}, x.options());
  bf16* dx_data = dx.mutable_data_ptr<bf16>();
  const float* h_data = h.const_data_ptr<float>();
  int64_t widest = features;
  for (const at::Tensor& w : weights) widest = std::max(widest, w.size(0));
  const Blocks blocks(tokens, rows_in_cache(widest));
  TokenSums sums(blocks.runs, dB_offsets.back());
  const Scratch<bf16> g(tokens * ranks);
  const auto low_rank = [&](int64_t first, Window& window) {
    return Piece{g.data() + first * ranks, ranks, spread.panels(window)};
  };
  const auto to_dx = [&](int64_t first, int64_t count, Window& window, Errands* near) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < dys.size(); ++i) {
      const int64_t ld = dys[i].stride(0);
      pieces.push_back({dys[i].const_data_ptr<bf16>() + first * ld, ld, bases[i].panels(window)});
    }
    if (!dropout) pieces.push_back(low_rank(first, window));
    bf16* const target = dx_data + first * features + window.first;
    block_product(pieces.data(), pieces.size(), count, window.count, nullptr, store_bfloat16(target, features), near);
  };
  const auto add_dropped = [&](int64_t first, int64_t count) {
    if (!dropout || ranks == 0) return;
    Window all(features);
    const Piece piece = low_rank(first, all);
    const Scratch<float> unmasked(count * features);
    block_product(&piece, 1, count, features, nullptr, store_float(unmasked.data(), features));
    const float scale = static_cast<float>(dropout->scale);
    bf16* const target = dx_data + first * features;
    for_words(*dropout, first * features, count * features, [&](int64_t e, bool keep) {
      if (keep) target[e] = static_cast<bf16>(static_cast<float>(target[e]) + unmasked[e] * scale);
    });
  };
  blocks.each([&](int64_t run, bool starts, int64_t first, int64_t count) {
    float* const total = sums.of(run);
    Columns columns(ranks);
    for (size_t i = 0; i < dys.size(); ++i) {
      const int64_t ld = dys[i].stride(0), out = dys[i].size(1);
      const bf16* dy = dys[i].const_data_ptr<bf16>() + first * ld;
      adapters.project(i, dy, ld, count, shrinks[i], g.data() + first * ranks);
      columns.product(
          !starts, h_data + first * ranks + adapters.offsets[i], ranks, adapters.rank(i), dy, ld, count, out,
          total + dB_offsets[i]);
    }
    if (needs_dx && when == When::kBefore) {
      Window all(features);
      Errands near;
      if (ranks > 0) near.add({x.const_data_ptr<bf16>() + first * x.stride(0), x.stride(0), count, features});
      if (const int64_t after = blocks.rows_after(first))
        for (const at::Tensor& dy : dys)
          near.add({dy.const_data_ptr<bf16>() + (first + count) * dy.stride(0), dy.stride(0), after, dy.size(1)});
      to_dx(first, count, all, &near);
      add_dropped(first, count);
    }
    Input input(x, dropout, blocks.size);
    const auto [x_hat, ld_hat] = input.rows(first, count);
    columns.product(!starts, g.data() + first * ranks, ranks, ranks, x_hat, ld_hat, count, features, total);
  });
  if (needs_dx && when == When::kByUnit) {
    int64_t elements = 0;
    for (const PackedB& base : bases) elements += base.unit_elements();
    each_window(features, elements, [&](Window& window) { to_dx(0, tokens, window, nullptr); });
    if (dropout) blocks.each([&](int64_t, bool, int64_t first, int64_t count) { add_dropped(first, count); });
  }
  std::vector<at::Tensor> dAs, dBs;
  for (size_t i = 0; i < weights.size(); ++i) {
    sums.want(0, ranks, adapters.offsets[i], false, 1.0, lora_As[i], dAs);
    sums.want(dB_offsets[i], adapters.rank(i), 0, true, scalings[i], lora_Bs[i], dBs);
  }
  sums.write();
  to_dtype_of(lora_As, dAs);
  to_dtype_of(lora_Bs, dBs);
  return {dx, std::move(dAs), std::move(dBs)};
}

}  // namespace aletheia::fused

#pragma GCC pop_options

#else

namespace aletheia::fused {

bool serves(const at::Tensor&, at::TensorList) { return false; }
std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_forward(
    const at::Tensor&, at::TensorList, const OptionalTensors&, at::TensorList, at::TensorList, at::ArrayRef<double>,
    const std::optional<Dropout>&) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_group_backward(
    at::TensorList, const at::Tensor&, const at::Tensor&, at::TensorList, at::TensorList, at::TensorList,
    at::ArrayRef<double>, const std::optional<Dropout>&, bool) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}

}  // namespace aletheia::fused

#endif
