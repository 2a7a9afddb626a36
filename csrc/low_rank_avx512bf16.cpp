// The low-rank half of a LoRA group by the micro-kernels of bf16_products.h: shrink h = x̂ Aᵀ, expand y += (s h) Bᵀ,
// g = dy (s B) and dx += g A are row products, dB_iᵀ = h_iᵀ (s dy_i) and dA = gᵀ x̂ column products.
//
// Tokens are walked in blocks, one thread a run of blocks, so that dy serves g and dB, and x serves dA, while it is in
// cache. Each thread sums its own dA and dB; these are added in thread order, so a run repeats bit for bit.
#include "low_rank.h"

#include <ATen/Parallel.h>

#include "bf16_products.h"

#ifdef ALETHEIA_AVX512BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia::low_rank {
namespace {

constexpr int64_t kTokens = 64;  // tokens in a block: x or dy of a few thousand features stays in second-level cache

// Panels that own their data.
struct Packed {
  int64_t inner, outer, pairs, panels;
  std::vector<uint16_t> data;

  template <typename Element>  // element(k, n) as float
  Packed(int64_t inner, int64_t outer, Element element)
      : inner(inner), outer(outer), pairs((inner + 1) / 2), panels((outer + kLanes - 1) / kLanes),
        data(panels * pairs * 2 * kLanes, 0) {
    for (int64_t n = 0; n < outer; ++n) {
      uint16_t* column = data.data() + (n / kLanes) * pairs * 2 * kLanes + (n % kLanes) * 2;
      for (int64_t k = 0; k < inner; ++k) column[(k / 2) * 2 * kLanes + k % 2] = bits(element(k, n));
    }
  }
  operator Panels() const { return {data.data(), pairs * 2 * kLanes, inner, outer}; }
};

// A float or bfloat16 matrix whose elements are read as float.
struct Elements {
  const void* data;
  bool wide;
  int64_t row, column;
  explicit Elements(const at::Tensor& t)
      : data(t.const_data_ptr()), wide(t.scalar_type() == at::kFloat), row(t.stride(0)), column(t.stride(1)) {}
  float operator()(int64_t i, int64_t j) const {
    const int64_t at = i * row + j * column;
    return wide ? static_cast<const float*>(data)[at] : static_cast<float>(static_cast<const bf16*>(data)[at]);
  }
};

// Two tokens' values of one rank side by side: what a column kernel broadcasts.
template <typename Value>  // value(token, rank) as float
void pair_up(std::vector<uint32_t>& out, int64_t ranks, int64_t tokens, Value value) {
  const int64_t pairs = (tokens + 1) / 2;
  out.resize(ranks * pairs);
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t r = 0; r < ranks; ++r) {
      const uint32_t even = bits(value(2 * pair, r)), odd = 2 * pair + 1 < tokens ? bits(value(2 * pair + 1, r)) : 0;
      out[pair * ranks + r] = even | odd << 16;
    }
}

// Rows [start, start + count) of dropout(x), or of x itself.
struct Input {
  const bf16* data;
  int64_t ld, features;
  const std::optional<Dropout>& dropout;
  std::vector<bf16> scratch;

  Input(const at::Tensor& x, const std::optional<Dropout>& dropout)
      : data(x.const_data_ptr<bf16>()), ld(x.stride(0)), features(x.size(1)), dropout(dropout) {}

  std::pair<const bf16*, int64_t> rows(int64_t start, int64_t count) {
    const bf16* source = data + start * ld;
    if (!dropout) return {source, ld};
    scratch.resize(kTokens * features);
    const float scale = static_cast<float>(dropout->scale);
    for (int64_t m = 0; m < count; ++m)
      for_words(*dropout, (start + m) * features, features, [&](int64_t k, bool keep) {
        scratch[m * features + k] =
            keep ? static_cast<bf16>(static_cast<float>(source[m * ld + k]) * scale) : static_cast<bf16>(0.0f);
      });
    return {scratch.data(), features};
  }

  template <typename Visit>
  static void for_words(const Dropout& dropout, int64_t first, int64_t count, Visit visit) {
    PhiloxBlock block{};
    for (int64_t k = 0; k < count; ++k) {
      const int64_t element = first + k;
      if (k == 0 || element % 4 == 0) block = philox(dropout.seed, static_cast<uint64_t>(element >> 2));
      visit(k, block.word[element % 4] >= dropout.threshold);
    }
  }
};

at::Tensor with_unit_columns(const at::Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

template <typename Body>  // body(start, count) over blocks of tokens
void over_blocks(int64_t tokens, Body body) {
  at::parallel_for(0, (tokens + kTokens - 1) / kTokens, 1, [&](int64_t first, int64_t last) {
    body(first * kTokens, std::min(last * kTokens, tokens));
  });
}

std::vector<int64_t> offsets_of(at::TensorList tensors, int64_t dim) {
  std::vector<int64_t> offsets{0};
  for (const at::Tensor& tensor : tensors) offsets.push_back(offsets.back() + tensor.size(dim));
  return offsets;
}

// The stacked A as [inner, outer]: transposed for shrink, as it stands for the input gradient.
Packed pack_stacked(at::TensorList lora_As, bool transposed) {
  const std::vector<int64_t> offsets = offsets_of(lora_As, 0);
  std::vector<Elements> elements(lora_As.begin(), lora_As.end());
  std::vector<int64_t> owner;
  for (size_t i = 0; i < elements.size(); ++i) owner.resize(offsets[i + 1], static_cast<int64_t>(i));
  const auto at_rank = [&](int64_t rank, int64_t k) { return elements[owner[rank]](rank - offsets[owner[rank]], k); };
  const int64_t ranks = offsets.back(), features = lora_As[0].size(1);
  if (transposed) return Packed(features, ranks, [&](int64_t k, int64_t n) { return at_rank(n, k); });
  return Packed(ranks, features, at_rank);
}

}  // namespace

bool available() {
  static const bool answer = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }();
  return answer;
}

void forward(
    const at::Tensor& x_any, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    const std::optional<Dropout>& dropout, at::TensorList ys, at::Tensor& h) {
  const at::Tensor x = with_unit_columns(x_any);
  const std::vector<int64_t> offsets = offsets_of(lora_As, 0);
  const int64_t ranks = offsets.back();
  const Packed shrink = pack_stacked(lora_As, /*transposed=*/true);
  std::vector<Packed> expands;
  for (const at::Tensor& lora_B : lora_Bs) {
    const Elements element(lora_B);
    expands.emplace_back(
        lora_B.size(1), lora_B.size(0), [&](int64_t k, int64_t n) { return element(n, k); });
  }
  float* h_data = h.mutable_data_ptr<float>();
  over_blocks(x.size(0), [&](int64_t first, int64_t last) {
    Input input(x, dropout);
    std::vector<bf16> scaled(kTokens * ranks);
    for (int64_t start = first; start < last; start += kTokens) {
      const int64_t count = std::min(kTokens, last - start);
      const auto [rows, ld] = input.rows(start, count);
      float* h_block = h_data + start * ranks;
      rows_product<Into::kFloat>(rows, ld, count, shrink, h_block, ranks);
      for (size_t i = 0; i < ys.size(); ++i) {
        for (int64_t m = 0; m < count; ++m)
          for (int64_t r = offsets[i]; r < offsets[i + 1]; ++r)
            scaled[m * ranks + r] = static_cast<bf16>(h_block[m * ranks + r] * static_cast<float>(scalings[i]));
        rows_product<Into::kAddBfloat16>(
            scaled.data() + offsets[i], ranks, count, expands[i],
            ys[i].mutable_data_ptr<bf16>() + start * ys[i].size(1), ys[i].size(1));
      }
    }
  });
}

void backward(
    at::TensorList dys_any, const at::Tensor& x_any, const at::Tensor& h, at::TensorList lora_Bs,
    at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout, at::Tensor& g, at::TensorList dAs,
    at::TensorList dBs) {
  const at::Tensor x = with_unit_columns(x_any);
  std::vector<at::Tensor> dys;
  for (const at::Tensor& dy : dys_any) dys.push_back(with_unit_columns(dy));
  const std::vector<int64_t> offsets = offsets_of(dAs, 0), columns = offsets_of(dBs, 0);
  const int64_t ranks = offsets.back(), features = x.size(1), threads = at::get_num_threads();

  std::vector<Packed> shrinks;  // s B, so that g comes out scaled
  int64_t dB_elements = 0;
  std::vector<int64_t> dB_offsets;
  for (size_t i = 0; i < dys.size(); ++i) {
    const Elements element(lora_Bs[i]);
    const float scaling = static_cast<float>(scalings[i]);
    shrinks.emplace_back(
        lora_Bs[i].size(0), lora_Bs[i].size(1),
        [&](int64_t k, int64_t n) { return static_cast<float>(static_cast<bf16>(element(k, n))) * scaling; });
    dB_offsets.push_back(dB_elements);
    dB_elements += dBs[i].numel();
  }
  at::Tensor sums = at::zeros({threads, ranks * features + dB_elements}, x.options().dtype(at::kFloat));
  float* sums_data = sums.mutable_data_ptr<float>();
  const float* h_data = h.const_data_ptr<float>();
  bf16* g_data = g.mutable_data_ptr<bf16>();
  over_blocks(x.size(0), [&](int64_t first, int64_t last) {
    float* dA = sums_data + at::get_thread_num() * sums.size(1);
    float* dB = dA + ranks * features;
    Input input(x, dropout);
    std::vector<float> g_block(kTokens * ranks);
    std::vector<uint32_t> coefficients;
    Interleaved interleaved;
    for (int64_t start = first; start < last; start += kTokens) {
      const int64_t count = std::min(kTokens, last - start);
      for (size_t i = 0; i < dys.size(); ++i) {
        const int64_t ld = dys[i].stride(0), out = dys[i].size(1), rank = offsets[i + 1] - offsets[i];
        const bf16* dy = dys[i].const_data_ptr<bf16>() + start * ld;
        rows_product<Into::kFloat>(dy, ld, count, shrinks[i], g_block.data() + offsets[i], ranks);
        pair_up(coefficients, rank, count, [&](int64_t t, int64_t r) {
          return h_data[(start + t) * ranks + offsets[i] + r];
        });
        interleaved.load(dy, ld, count, out);
        columns_product(coefficients, rank, interleaved, out, dB + dB_offsets[i]);
      }
      for (int64_t e = 0; e < count * ranks; ++e) g_data[start * ranks + e] = static_cast<bf16>(g_block[e]);
      pair_up(coefficients, ranks, count, [&](int64_t t, int64_t r) { return g_block[t * ranks + r]; });
      const auto [rows, ld] = input.rows(start, count);
      interleaved.load(rows, ld, count, features);
      columns_product(coefficients, ranks, interleaved, features, dA);
    }
  });
  const at::Tensor total = threads > 1 ? sums.sum(0) : sums[0];
  for (size_t i = 0; i < dys.size(); ++i) {
    const int64_t rank = offsets[i + 1] - offsets[i];
    at::Tensor dA_i = dAs[i], dB_i = dBs[i];
    dA_i.copy_(total.narrow(0, offsets[i] * features, rank * features).view({rank, features}));
    dB_i.copy_(total.narrow(0, ranks * features + dB_offsets[i], dB_i.numel()).view({rank, dB_i.size(0)}).t());
    dB_i.mul_(scalings[i]);
  }
}

void add_input_gradient(
    const at::Tensor& g, at::TensorList lora_As, const std::optional<Dropout>& dropout, at::Tensor& dx) {
  const Packed stacked = pack_stacked(lora_As, /*transposed=*/false);
  const bf16* g_data = g.const_data_ptr<bf16>();
  bf16* dx_data = dx.mutable_data_ptr<bf16>();
  const int64_t ranks = g.size(1), features = dx.size(1);
  over_blocks(g.size(0), [&](int64_t first, int64_t last) {
    std::vector<float> block(dropout ? kTokens * features : 0);
    for (int64_t start = first; start < last; start += kTokens) {
      const int64_t count = std::min(kTokens, last - start);
      bf16* target = dx_data + start * features;
      if (!dropout) {
        rows_product<Into::kAddBfloat16>(g_data + start * ranks, ranks, count, stacked, target, features);
        continue;
      }
      rows_product<Into::kFloat>(g_data + start * ranks, ranks, count, stacked, block.data(), features);
      const float scale = static_cast<float>(dropout->scale);
      Input::for_words(*dropout, start * features, count * features, [&](int64_t e, bool keep) {
        if (keep) target[e] = static_cast<bf16>(static_cast<float>(target[e]) + block[e] * scale);
      });
    }
  });
}

}  // namespace aletheia::low_rank

#pragma GCC pop_options

#else

namespace aletheia::low_rank {

bool available() { return false; }
void forward(
    const at::Tensor&, at::TensorList, at::TensorList, at::ArrayRef<double>, const std::optional<Dropout>&,
    at::TensorList, at::Tensor&) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}
void backward(
    at::TensorList, const at::Tensor&, const at::Tensor&, at::TensorList, at::ArrayRef<double>,
    const std::optional<Dropout>&, at::Tensor&, at::TensorList, at::TensorList) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}
void add_input_gradient(const at::Tensor&, at::TensorList, const std::optional<Dropout>&, at::Tensor&) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}

}  // namespace aletheia::low_rank

#endif
