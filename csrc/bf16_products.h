// Skinny bfloat16 products with float32 accumulators (vdpbf16ps: 16 float lanes, two bfloat16 products each a step).
//
//   rows     C[m, :] = or += a[m, :] B        a row-major, B packed in pairs along the inner dimension
//   columns  C[r, :] += Σ_t c[t, r] z[t, :]   z a block of rows, interleaved in pairs
//
// Only for translation units that check the processor first.
#pragma once

#include "instruction_set.h"

#ifdef ALETHEIA_X86_SETS
#define ALETHEIA_AVX512BF16 1

#include <ATen/core/Tensor.h>

#include <immintrin.h>

#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#pragma GCC push_options
// GCC 12 warns of its own intrinsics headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia {
namespace {

using bf16 = at::BFloat16;

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

// exp(v) = 2^n 2^f, f = v log2(e) - n in [-1/2, 1/2]: 2^f by the degree-6 Taylor polynomial of exp(f ln 2), remainder
// (ln 2 / 2)^7 / 7! = 1.2e-7, one float ulp. Underflows to zero.
inline __m512 exponential(__m512 v) {
  const __m512 t = _mm512_mul_ps(_mm512_max_ps(v, _mm512_set1_ps(-126.0f)), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 u = _mm512_mul_ps(_mm512_sub_ps(t, n), _mm512_set1_ps(0.693147181f));
  __m512 p = _mm512_set1_ps(1.0f / 720.0f);
  for (const float c : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// B [inner, outer] in panels of 16 columns; a panel holds, for every pair of inner indices, 16 pairs. A view: a range of
// columns or of pairs is the same with another start.
struct Panels {
  const uint16_t* data;
  int64_t stride;  // from panel to panel
  int64_t inner, outer;

  int64_t count() const { return (outer + kLanes - 1) / kLanes; }
  const uint16_t* panel(int64_t index) const { return data + index * stride; }
};

enum class Into { kFloat, kAddFloat };

// kRows rows of C against kPanels panels of B.
template <int kRows, int kPanels, Into kInto>
inline void row_kernel(const bf16* a, int64_t lda, const Panels& b, int64_t panel, float* c, int64_t ldc) {
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
      float* target = c + m * ldc + column;
      if constexpr (kInto == Into::kAddFloat) sum[m][p] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target), sum[m][p]);
      _mm512_mask_storeu_ps(target, mask, sum[m][p]);
    }
  }
}

// kRows rows of C from end to end: what is added to is read in order, and the rows of a stay in first-level cache.
template <int kRows, Into kInto>
void row_strip(const bf16* a, int64_t lda, const Panels& b, float* c, int64_t ldc) {
  for (int64_t panel = 0; panel < b.count(); panel += kMaxPanels) {
    switch (std::min(kMaxPanels, b.count() - panel)) {
      case 1: row_kernel<kRows, 1, kInto>(a, lda, b, panel, c, ldc); break;
      case 2: row_kernel<kRows, 2, kInto>(a, lda, b, panel, c, ldc); break;
      case 3: row_kernel<kRows, 3, kInto>(a, lda, b, panel, c, ldc); break;
      default: row_kernel<kRows, 4, kInto>(a, lda, b, panel, c, ldc); break;
    }
  }
}

// C [rows, b.outer] = or += a [rows, b.inner] B. The fewer panels, the more rows it takes to keep the adders busy.
template <Into kInto>
void rows_product(const bf16* a, int64_t lda, int64_t rows, const Panels& b, float* c, int64_t ldc) {
  int64_t m = 0;
  [[maybe_unused]] const auto strips = [&]<int kRows>(std::integral_constant<int, kRows>) {
    for (; m + kRows <= rows; m += kRows)
      row_strip<kRows, kInto>(a + m * lda, lda, b, c + m * ldc, ldc);
  };
  if (b.count() == 1) strips(std::integral_constant<int, 12>{});
  if (b.count() <= 3) strips(std::integral_constant<int, 8>{});
  strips(std::integral_constant<int, 6>{});
  strips(std::integral_constant<int, 4>{});
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

// 32 columns of kRanks rows of C += Σ over pairs of tokens. coefficients [pairs, ranks] hold two bfloat16 each.
template <int kRanks>
void column_kernel(
    const uint32_t* coefficients, int64_t ranks, int64_t pairs, const uint16_t* z, int64_t columns, float* c,
    int64_t ldc) {
  __m512 low[kRanks], high[kRanks];
  for (int r = 0; r < kRanks; ++r) low[r] = high[r] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512i first = _mm512_loadu_si512(z + pair * 4 * kLanes);
    const __m512i second = _mm512_loadu_si512(z + pair * 4 * kLanes + 2 * kLanes);
    for (int r = 0; r < kRanks; ++r) {
      const __m512i coefficient = _mm512_set1_epi32(static_cast<int>(coefficients[pair * ranks + r]));
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

// C [ranks, columns], which lies as [columns / 32][ranks][32], += coefficientsᵀ z over one block of tokens.
inline void columns_product(
    const uint32_t* coefficients, int64_t ranks, const Interleaved& z, int64_t columns, float* c) {
  constexpr int64_t kRow = 2 * kLanes;
  const int64_t passes = (ranks + kMaxRanks - 1) / kMaxRanks;
  for (int64_t column = 0; column < columns; column += 2 * kLanes)
    for (int64_t pass = 0, rank = 0; pass < passes; ++pass) {
      const int64_t count = (ranks - rank + passes - pass - 1) / (passes - pass);
      kColumnKernels[count - 1](
          coefficients + rank, ranks, z.pairs, z.columns(column), columns - column,
          c + column * ranks + rank * kRow, kRow);
      rank += count;
    }
}

}  // namespace
}  // namespace aletheia

#pragma GCC pop_options

#endif
