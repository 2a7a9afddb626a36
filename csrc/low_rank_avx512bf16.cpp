// Skinny bfloat16 products with float32 accumulators (vdpbf16ps: 16 float lanes, two bfloat16 products each a step).
//
// Two micro-kernels carry all five products of a LoRA group:
//
//   rows     C[m, :] (+)= a[m, :] B      a row-major, B packed in pairs along the inner dimension;
//                                        shrink h = x̂ Aᵀ, expand y += (s h) Bᵀ, g = dy (s B), dx += g A
//   columns  C[r, :] += Σ_t c[t, r] z[t, :]   z a block of tokens, its rows interleaved in pairs;
//                                        dB_iᵀ = h_iᵀ (s dy_i), dA = gᵀ x̂
//
// Tokens are walked in blocks, one thread a run of blocks, so that dy serves g and dB, and x serves dA, while it is in
// cache. Each thread sums its own dA and dB; these are added in thread order, so a run repeats bit for bit.
#include "low_rank.h"

#include <ATen/Parallel.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>

#pragma GCC push_options
// GCC 12 warns of its own intrinsics headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia::low_rank {
namespace {

using bf16 = at::BFloat16;

constexpr int64_t kTokens = 64;    // tokens in a block: x or dy of a few thousand features stays in second-level cache
constexpr int64_t kLanes = 16;     // float lanes of a register
constexpr int64_t kMaxPanels = 4;  // registers of B a row kernel holds
constexpr int64_t kMaxRanks = 12;  // ranks of C a column kernel holds, two registers each, of 32

inline uint16_t bits(float value) {
  uint32_t u;
  std::memcpy(&u, &value, sizeof(u));
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline __m512 widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
inline __m256i narrow(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1u);
}

// B [inner, outer] in panels of 16 columns; a panel holds, for every pair of inner indices, 16 pairs.
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
  const uint16_t* panel(int64_t index) const { return data.data() + index * pairs * 2 * kLanes; }
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

enum class Into { kFloat, kAddBfloat16 };

// kRows rows of C against kPanels panels of B.
template <int kRows, int kPanels, Into kInto>
inline void row_kernel(const bf16* a, int64_t lda, const Packed& b, int64_t panel, void* c, int64_t ldc) {
  __m512 sum[kRows][kPanels];
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p) sum[m][p] = _mm512_setzero_ps();
  const uint16_t* columns[kPanels];
  for (int p = 0; p < kPanels; ++p) columns[p] = b.panel(panel + p);
  const int64_t whole = b.inner / 2;
  const auto step = [&](int64_t pair, bool last_is_half) __attribute__((always_inline)) {
    __m512i right[kPanels];
    for (int p = 0; p < kPanels; ++p) right[p] = _mm512_loadu_si512(columns[p] + pair * 2 * kLanes);
    for (int m = 0; m < kRows; ++m) {
      uint32_t left = 0;
      std::memcpy(&left, a + m * lda + 2 * pair, last_is_half ? 2 : 4);
      const __m512i both = _mm512_set1_epi32(static_cast<int>(left));
      for (int p = 0; p < kPanels; ++p) sum[m][p] = multiply_add(sum[m][p], both, right[p]);
    }
  };
  for (int64_t pair = 0; pair < whole; ++pair) step(pair, false);
  if (b.inner % 2) step(whole, true);

  for (int p = 0; p < kPanels; ++p) {
    const int64_t column = (panel + p) * kLanes;
    const __mmask16 mask = first_lanes(b.outer - column);
    for (int m = 0; m < kRows; ++m) {
      if constexpr (kInto == Into::kFloat) {
        _mm512_mask_storeu_ps(static_cast<float*>(c) + m * ldc + column, mask, sum[m][p]);
      } else {
        bf16* target = static_cast<bf16*>(c) + m * ldc + column;
        const __m512 before = widen(_mm256_maskz_loadu_epi16(mask, target));
        _mm256_mask_storeu_epi16(target, mask, narrow(_mm512_add_ps(before, sum[m][p])));
      }
    }
  }
}

// kRows rows of C from end to end: what is added to is read in order, and the rows of a stay in first-level cache.
template <int kRows, Into kInto>
void row_strip(const bf16* a, int64_t lda, const Packed& b, void* c, int64_t ldc) {
  for (int64_t panel = 0; panel < b.panels; panel += kMaxPanels) {
    switch (std::min(kMaxPanels, b.panels - panel)) {
      case 1: row_kernel<kRows, 1, kInto>(a, lda, b, panel, c, ldc); break;
      case 2: row_kernel<kRows, 2, kInto>(a, lda, b, panel, c, ldc); break;
      case 3: row_kernel<kRows, 3, kInto>(a, lda, b, panel, c, ldc); break;
      default: row_kernel<kRows, 4, kInto>(a, lda, b, panel, c, ldc); break;
    }
  }
}

// C [rows, b.outer] = or += a [rows, b.inner] B. The fewer panels, the more rows it takes to keep the adders busy.
template <Into kInto>
void rows_product(const bf16* a, int64_t lda, int64_t rows, const Packed& b, void* c, int64_t ldc) {
  constexpr int64_t kSize = kInto == Into::kFloat ? sizeof(float) : sizeof(bf16);
  int64_t m = 0;
  const auto strips = [&]<int kRows>(std::integral_constant<int, kRows>) {
    for (; m + kRows <= rows; m += kRows)
      row_strip<kRows, kInto>(a + m * lda, lda, b, static_cast<char*>(c) + m * ldc * kSize, ldc);
  };
  if (b.panels == 1) strips(std::integral_constant<int, 12>{});
  if (b.panels <= 3) strips(std::integral_constant<int, 8>{});
  strips(std::integral_constant<int, 6>{});
  strips(std::integral_constant<int, 1>{});
}

// A block of rows of z with the rows of each pair interleaved: for every 32 columns and pair of tokens, two registers.
// Rows are read from end to end, which the hardware prefetches; 32 columns of 64 rows would be 64 pages apart.
class Interleaved {
 public:
  int64_t pairs = 0;

  void load(const bf16* z, int64_t ldz, int64_t tokens, int64_t columns) {
    pairs = (tokens + 1) / 2;
    stride_ = pairs * 4 * kLanes + kSkew;
    data_.resize((columns + 2 * kLanes - 1) / (2 * kLanes) * stride_);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const bf16* row = z + 2 * pair * ldz;
      uint16_t* target = data_.data() + pair * 4 * kLanes;
      for (int64_t column = 0; column < columns; column += 2 * kLanes, target += stride_) {
        const int64_t left = columns - column;
        const __mmask32 mask = left >= 2 * kLanes ? __mmask32(~0u) : __mmask32((1u << left) - 1u);
        const __m512i even = _mm512_maskz_loadu_epi16(mask, row + column);
        const __m512i odd =
            2 * pair + 1 < tokens ? _mm512_maskz_loadu_epi16(mask, row + ldz + column) : _mm512_setzero_si512();
        // Within each 128-bit lane: columns 0-3 of the lane's eight here, 4-7 there; put right when C is stored.
        _mm512_storeu_si512(target, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(target + 2 * kLanes, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }
  const uint16_t* columns(int64_t column) const { return data_.data() + column / (2 * kLanes) * stride_; }

 private:
  static constexpr int64_t kSkew = 2 * kLanes;  // neighbouring column blocks start in different cache sets
  int64_t stride_ = 0;
  std::vector<uint16_t> data_;
};

// 32 columns of kRanks rows of C += Σ over pairs of tokens. coefficients [ranks, pairs] hold two bfloat16 each.
template <int kRanks>
void column_kernel(
    const uint32_t* coefficients, int64_t pairs, const uint16_t* z, int64_t columns, float* c, int64_t ldc) {
  __m512 low[kRanks], high[kRanks];
  for (int r = 0; r < kRanks; ++r) low[r] = high[r] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512i first = _mm512_loadu_si512(z + pair * 4 * kLanes);
    const __m512i second = _mm512_loadu_si512(z + pair * 4 * kLanes + 2 * kLanes);
    for (int r = 0; r < kRanks; ++r) {
      const __m512i coefficient = _mm512_set1_epi32(static_cast<int>(coefficients[r * pairs + pair]));
      low[r] = multiply_add(low[r], coefficient, first);
      high[r] = multiply_add(high[r], coefficient, second);
    }
  }
  const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __mmask16 mask_left = first_lanes(columns), mask_right = first_lanes(std::max<int64_t>(columns - kLanes, 0));
  for (int r = 0; r < kRanks; ++r) {
    float* target = c + r * ldc;
    const __m512 columns_left = _mm512_permutex2var_ps(low[r], left, high[r]);
    const __m512 columns_right = _mm512_permutex2var_ps(low[r], right, high[r]);
    _mm512_mask_storeu_ps(target, mask_left, _mm512_add_ps(_mm512_maskz_loadu_ps(mask_left, target), columns_left));
    _mm512_mask_storeu_ps(
        target + kLanes, mask_right,
        _mm512_add_ps(_mm512_maskz_loadu_ps(mask_right, target + kLanes), columns_right));
  }
}

using ColumnKernel = decltype(&column_kernel<1>);
template <int... kCounts>
constexpr std::array<ColumnKernel, sizeof...(kCounts)> column_kernels(std::integer_sequence<int, kCounts...>) {
  return {&column_kernel<kCounts + 1>...};
}
constexpr auto kColumnKernels = column_kernels(std::make_integer_sequence<int, kMaxRanks>{});

// C [ranks, columns] += coefficientsᵀ z over one block of tokens.
void columns_product(
    const std::vector<uint32_t>& coefficients, int64_t ranks, const Interleaved& z, int64_t columns, float* c) {
  const int64_t passes = (ranks + kMaxRanks - 1) / kMaxRanks;
  for (int64_t column = 0; column < columns; column += 2 * kLanes)
    for (int64_t pass = 0, rank = 0; pass < passes; ++pass) {
      const int64_t count = (ranks - rank + passes - pass - 1) / (passes - pass);
      kColumnKernels[count - 1](
          coefficients.data() + rank * z.pairs, z.pairs, z.columns(column), columns - column,
          c + rank * columns + column, columns);
      rank += count;
    }
}

// Two tokens' values of one rank side by side, ranks outermost: what a column kernel broadcasts.
template <typename Value>  // value(token, rank) as float
void pair_up(std::vector<uint32_t>& out, int64_t ranks, int64_t tokens, Value value) {
  const int64_t pairs = (tokens + 1) / 2;
  out.resize(ranks * pairs);
  for (int64_t r = 0; r < ranks; ++r)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const uint32_t even = bits(value(2 * pair, r)), odd = 2 * pair + 1 < tokens ? bits(value(2 * pair + 1, r)) : 0;
      out[r * pairs + pair] = even | odd << 16;
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
