#include "fixed_point.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "instruction_set.h"
#include "operators.h"
#include "tasks.h"
#include "transposed.h"

#ifdef ALETHEIA_X86_SETS
#include <immintrin.h>

#pragma GCC push_options
// GCC 12 warns of its own intrinsics headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prfchw")

namespace aletheia::fixed_point {
namespace {

using bf16 = at::BFloat16;

constexpr int64_t kLanes = 16;
constexpr int64_t kGroup = 128;    // inner indices that share a scale: 128 products of less than 2^24 fit 32 bits
constexpr int64_t kPairs = kGroup / 2;
constexpr int64_t kMostPanels = 4;  // registers of the right factor that a kernel holds; fewer for results as narrow
constexpr int64_t kMostColumns = kMostPanels * kLanes;
constexpr int64_t kRowsMultiple = 12;  // of every kernel's height
constexpr int64_t kMostRows = 1024;  // of one task: their sums stay in second-level cache
constexpr int64_t kFewestRows = 96;  // that a task is cut down to so that threads end together

inline __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : count <= 0 ? __mmask32(0) : (__mmask32(1) << count) - 1;
}
inline __mmask16 first_of_16(int64_t count) { return static_cast<__mmask16>(first_of_32(count) & 0xffff); }

// Biased exponents, as bfloat16 and float32 have them. With e that of the largest magnitude, the factor 2^(138 - e) takes
// it to 2^11 or more and less than 2^12: exponent 265 - e. Where that leaves no normal inverse, numbers of less than
// 2^-115, they are rounded more coarsely.
constexpr int kFactorPlusLargest = 265, kMostFactor = 253, kInverseSum = 254, kNotFinite = 255;

struct Scale {
  __m512 factor, inverse;  // NaN for the inverse where the largest is not finite
};

inline Scale scale_of(__m512i largest_bits) {
  const __m512i e = _mm512_srli_epi32(largest_bits, 7);
  const __m512i factor =
      _mm512_min_epi32(_mm512_sub_epi32(_mm512_set1_epi32(kFactorPlusLargest), e), _mm512_set1_epi32(kMostFactor));
  const __m512i inverse = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(kInverseSum), factor), 23);
  const __mmask16 not_finite = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(kNotFinite));
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(factor, 23)),
      _mm512_castsi512_ps(_mm512_mask_mov_epi32(inverse, not_finite, _mm512_set1_epi32(0x7fc00000)))};
}

inline __m512i magnitudes(__m512i halves) { return _mm512_and_si512(halves, _mm512_set1_epi16(0x7fff)); }

inline uint32_t largest_of(__m512i magnitudes) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i all_ones = _mm_set1_epi16(-1);
  return 0xffffu ^ static_cast<uint32_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, all_ones)), 0));
}

inline __m512i rounded(__m512i float_bits, __m512 factor) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(float_bits), factor));
}
// Low words from even, high words from odd: pairs along the inner index, as vpdpwssd reads them.
inline __m512i paired(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
}
inline __m512i rounded_pairs(__m512i pairs, __m512 factor) {
  return paired(
      rounded(_mm512_slli_epi32(pairs, 16), factor), rounded(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)), factor));
}

constexpr int kWords = kPairs / kLanes;  // registers of a group's pairs

// The first `count` of a group's elements, which lie one after another, rounded; zeros follow. Returns the inverse scale.
inline float round_group(const bf16* elements, int64_t count, __m512i (&words)[kWords]) {
  __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int w = 0; w < kWords; ++w) {
    words[w] = _mm512_maskz_loadu_epi16(first_of_32(count - 32 * w), elements + 32 * w);
    largest = _mm512_max_epu16(largest, magnitudes(words[w]));
  }
  const Scale scale = scale_of(_mm512_set1_epi32(static_cast<int>(largest_of(largest))));
#pragma GCC unroll 4
  for (int w = 0; w < kWords; ++w) words[w] = rounded_pairs(words[w], scale.factor);
  return _mm512_cvtss_f32(scale.inverse);
}

}  // namespace

// A left factor, rounded: one group of all rows after another, in which a row's 128 numbers lie side by side.
class Left {
 public:
  explicit Left(const at::Tensor& any)
      : rows(any.size(0)), inner(any.size(1)), groups((inner + kGroup - 1) / kGroup), numbers_(groups * rows * kGroup),
        scales_(groups * rows) {
    const at::Tensor a = with_unit_columns(any);
    const bf16* const data = a.const_data_ptr<bf16>();
    const int64_t ld = a.stride(0);
    constexpr int64_t kGrain = 1 << 14;
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max(inner, kGroup)), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        for (int64_t group = 0; group < groups; ++group) {
          __m512i words[kWords];
          scales_[group * rows + row] =
              round_group(data + row * ld + group * kGroup, inner - group * kGroup, words);
          int16_t* const target = numbers_.data() + (group * rows + row) * kGroup;
          for (int w = 0; w < kWords; ++w) _mm512_storeu_si512(target + 2 * kLanes * w, words[w]);
        }
    });
  }
  const int16_t* numbers(int64_t group, int64_t row) const { return numbers_.data() + (group * rows + row) * kGroup; }
  const float* scales(int64_t group, int64_t row) const { return scales_.data() + group * rows + row; }

  int64_t rows, inner, groups;

 private:
  Scratch<int16_t> numbers_;
  Scratch<float> scales_;
};

std::shared_ptr<const Left> rounded(const at::Tensor& left) { return std::make_shared<const Left>(left); }

namespace {

// A right factor [inner, outer] whose elements lie one after another along one of the two.
struct Right {
  at::Tensor owner;
  const bf16* data;
  int64_t ld, inner, outer;
  bool along_inner;

  explicit Right(const at::Tensor& any)
      : owner(any.stride(0) == 1 || any.stride(1) == 1 ? any : any.contiguous()), data(owner.const_data_ptr<bf16>()),
        inner(any.size(0)), outer(any.size(1)), along_inner(owner.stride(1) != 1) {
    ld = owner.stride(along_inner ? 1 : 0);
  }

  // Asks for part `part` of `parts` of the lines of a group of so many columns: each of its rows or columns lies on
  // another page, and no processor fetches those unasked. Inlined, since GCC 12 drops calls of what only prefetches.
  __attribute__((always_inline)) void fetch(
      int64_t group, int64_t column, int64_t columns, int64_t part, int64_t parts) const {
    constexpr int64_t kLine = 64 / sizeof(bf16);
    const int64_t first = group * kGroup;
    const int64_t deep = std::min(kGroup, inner - first), wide = std::min(columns, outer - column);
    const int64_t pieces = along_inner ? wide : deep, length = along_inner ? deep : wide;
    const bf16* const start = along_inner ? data + column * ld + first : data + first * ld + column;
    for (int64_t piece = part * pieces / parts; piece < (part + 1) * pieces / parts; ++piece) {
      for (int64_t k = 0; k < length; k += kLine) __builtin_prefetch(start + piece * ld + k, 0, 2);
      __builtin_prefetch(start + piece * ld + length - 1, 0, 2);
    }
  }
};

// One group of some columns of a right factor, rounded: panels of 16 columns, each pair after pair of the inner index.
struct Panels {
  alignas(64) int16_t numbers[kMostPanels][kPairs][2 * kLanes];
  alignas(64) float scales[kMostPanels][kLanes];

  void load(const Right& b, int64_t group, int64_t column, int64_t panels) {
    const int64_t first = group * kGroup, count = std::min(kGroup, b.inner - first);
    for (int64_t panel = 0; panel < panels; ++panel, column += kLanes) {
      const int64_t columns = std::clamp<int64_t>(b.outer - column, 0, kLanes);
      if (b.along_inner) {
        load_columns(b.data + column * b.ld + first, b.ld, count, columns, panel);
      } else {
        load_rows(b.data + first * b.ld + column, b.ld, count, columns, panel);
      }
    }
  }

 private:
  void load_columns(const bf16* source, int64_t ld, int64_t count, int64_t columns, int64_t panel) {
    __m512i words[kLanes][kWords];
    for (int64_t c = 0; c < kLanes; ++c) scales[panel][c] = round_group(source + c * ld, c < columns ? count : 0, words[c]);
    for (int w = 0; w < kWords; ++w) {
      __m512i block[kLanes];
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) block[c] = words[c][w];
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) _mm512_store_si512(numbers[panel][w * kLanes + k], block[k]);
    }
  }
  void load_rows(const bf16* source, int64_t ld, int64_t count, int64_t columns, int64_t panel) {
    const __mmask16 mask = first_of_16(columns);
    const auto row = [&](int64_t k) __attribute__((always_inline)) {
      return k < count ? _mm256_maskz_loadu_epi16(mask, source + k * ld) : _mm256_setzero_si256();
    };
    __m256i largest = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; ++k)
      largest = _mm256_max_epu16(largest, _mm256_and_si256(row(k), _mm256_set1_epi16(0x7fff)));
    const Scale scale = scale_of(_mm512_cvtepu16_epi32(largest));
    _mm512_store_ps(scales[panel], scale.inverse);
    const auto of = [&](int64_t k) __attribute__((always_inline)) {
      return rounded(_mm512_slli_epi32(_mm512_cvtepu16_epi32(row(k)), 16), scale.factor);
    };
    for (int64_t pair = 0; pair < kPairs; ++pair)
      _mm512_store_si512(numbers[panel][pair], paired(of(2 * pair), of(2 * pair + 1)));
  }
};

// kRows rows of a group against its panels: c [kRows, 16 kPanels] = or += their products. The instruction is written out
// because GCC 12 keeps sums in memory that the intrinsic has added to.
template <int kRows, int kPanels, bool kAdd>
void kernel(const int16_t* a, const float* scales, const Panels& b, int64_t pairs, float* c) {
  __m512i sum[kRows][kPanels];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) sum[m][p] = _mm512_setzero_si512();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512i right[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) right[p] = _mm512_load_si512(b.numbers[p][pair]);
    // The next strip's numbers and sums, which lie in second-level cache or further: a 64th of either each time.
    __builtin_prefetch(a + kRows * kGroup + 2 * kRows * pair);
    if constexpr (kAdd) __builtin_prefetch(c + kRows * kPanels * kLanes + kRows * kPanels * pair / 4);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      int both;
      std::memcpy(&both, a + m * kGroup + 2 * pair, sizeof(both));
      const __m512i left = _mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p)
        asm("vpdpwssd %2, %1, %0" : "+v"(sum[m][p]) : "v"(left), "v"(right[p]));
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    const __m512 scale = _mm512_set1_ps(scales[m]);
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      float* const target = c + (m * kPanels + p) * kLanes;
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][p]), _mm512_load_ps(b.scales[p]));
      if constexpr (kAdd) {
        _mm512_store_ps(target, _mm512_fmadd_ps(value, scale, _mm512_load_ps(target)));
      } else {
        _mm512_store_ps(target, _mm512_mul_ps(value, scale));
      }
    }
  }
}

// Rows that a kernel goes through at a time: two dozen sums, or as many as hide the instruction's latency.
template <int kPanels>
constexpr int kHeight = kPanels == kMostPanels ? 6 : 12;
static_assert(kRowsMultiple % kHeight<1> == 0 && kRowsMultiple % kHeight<kMostPanels> == 0);

template <int kPanels, bool kAdd, int kRows = kHeight<kPanels>>
void strip(int64_t rows, const int16_t* a, const float* scales, const Panels& b, int64_t pairs, float* c) {
  if (rows == kRows) return kernel<kRows, kPanels, kAdd>(a, scales, b, pairs, c);
  if constexpr (kRows > 1) strip<kPanels, kAdd, kRows - 1>(rows, a, scales, b, pairs, c);
}

// To the nearest, ties to even. A NaN here has zeros in its lower half, which carry nothing (convert.h).
inline __m256i narrow(__m512 value) {
  const __m512i u = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

struct Result {
  std::vector<const Left*> lefts;
  std::vector<Right> rights;
  at::Tensor bias;  // float32, or undefined
  at::Tensor out;
  int64_t columns;

  // Of 16 columns each, that a task takes.
  int64_t panels() const { return columns > 2 * kLanes ? kMostPanels : columns > kLanes ? 2 : 1; }
  int64_t blocks() const { return (columns + panels() * kLanes - 1) / (panels() * kLanes); }

  // Rows [first, end) of a block of columns.
  void block(int64_t index, int64_t first, int64_t end, Panels& scratch, float* sums) const {
    switch (panels()) {
      case 1: return block_of<1>(index * kLanes, first, end, scratch, sums);
      case 2: return block_of<2>(index * 2 * kLanes, first, end, scratch, sums);
      default: return block_of<kMostPanels>(index * kMostColumns, first, end, scratch, sums);
    }
  }

 private:
  template <int kPanels>
  void block_of(int64_t column, int64_t first, int64_t end, Panels& panels, float* sums) const {
    constexpr int64_t kColumns = kPanels * kLanes, kStrip = kHeight<kPanels>;
    int64_t left = 0;
    for (const Left* factor : lefts) left += factor->groups;
    if (left == 0) {
      std::fill_n(sums, (end - first) * kColumns, 0.0f);
      finish(column, kColumns, first, end, sums);
    }
    bool adds = false;
    const int64_t strips = (end - first + kStrip - 1) / kStrip;
    for (size_t i = 0; i < lefts.size(); ++i)
      for (int64_t group = 0; group < lefts[i]->groups; ++group, adds = true) {
        panels.load(rights[i], group, column, kPanels);
        const int64_t pairs = (std::min(kGroup, lefts[i]->inner - group * kGroup) + 1) / 2;
        const bool last = --left == 0;
        for (int64_t row = first; row < end; row += kStrip) {
          const int64_t count = std::min(kStrip, end - row);
          float* const of_rows = sums + (row - first) * kColumns;
          if (last) fetch(column, kColumns, row, row + count);
          if (group + 1 < lefts[i]->groups)
            rights[i].fetch(group + 1, column, kColumns, (row - first) / kStrip, strips);
          (adds ? strip<kPanels, true> : strip<kPanels, false>)(
              count, lefts[i]->numbers(group, row), lefts[i]->scales(group, row), panels, pairs, of_rows);
          if (last) finish(column, kColumns, row, row + count, of_rows);
        }
      }
  }
  // Lines that are going to be written, a row of which is pages from the next.
  __attribute__((always_inline)) void fetch(int64_t column, int64_t width, int64_t first, int64_t end) const {
    const int64_t size = out.element_size(), ld = out.stride(0) * size;
    const char* const start = static_cast<const char*>(out.const_data_ptr()) + column * size;
    for (int64_t row = first; row < end; ++row)
      for (int64_t k = 0; k < width * size; k += 64) __builtin_prefetch(start + row * ld + k, 1, 3);
  }
  void finish(int64_t column, int64_t width, int64_t first, int64_t end, const float* sums) const {
    if (out.scalar_type() == at::kFloat) {
      finish_in(out.mutable_data_ptr<float>(), column, width, first, end, sums);
    } else {
      finish_in(out.mutable_data_ptr<bf16>(), column, width, first, end, sums);
    }
  }
  template <typename T>
  void finish_in(T* to, int64_t column, int64_t width, int64_t first, int64_t end, const float* sums) const {
    const float* const start = bias.defined() ? bias.const_data_ptr<float>() + column : nullptr;
    const int64_t ld = out.stride(0);
    for (int64_t row = first; row < end; ++row, sums += width) {
      T* const target = to + row * ld + column;
      for (int64_t k = 0; k < std::min(width, columns - column); k += kLanes) {
        const __mmask16 mask = first_of_16(columns - column - k);
        __m512 value = _mm512_load_ps(sums + k);
        if (start) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, start + k));
        if constexpr (std::is_same_v<T, float>) {
          _mm512_mask_storeu_ps(target + k, mask, value);
        } else {
          _mm256_mask_storeu_epi16(target + k, mask, narrow(value));
        }
      }
    }
  }
};

}  // namespace

bool serves(at::ScalarType dtype, int64_t rows) {
  return dtype == at::kBFloat16 && rows > 0 && instruction_set() == InstructionSet::kAvx512Vnni;
}

void multiply(const std::vector<Sum>& sums) {
  const int64_t rows = sums.front().out.size(0);
  std::vector<Result> results;
  std::vector<int64_t> starts{0};
  for (const Sum& sum : sums) {
    Result result{{}, {}, {}, sum.out, sum.out.size(1)};
    for (const auto& left : sum.lefts) result.lefts.push_back(left.get());
    for (const at::Tensor& right : sum.rights) result.rights.emplace_back(right);
    if (sum.bias) result.bias = sum.bias->to(at::kFloat).contiguous();
    starts.push_back(starts.back() + result.blocks());
    results.push_back(std::move(result));
  }
  // A task is a block of columns and some of the rows. Each rounds its right factor anew, so that rows are cut no finer
  // than it takes for threads to end within an eighth of their time.
  const int64_t blocks = std::max<int64_t>(starts.back(), 1);
  const int64_t wanted = std::max((8 * at::get_num_threads() + blocks - 1) / blocks, (rows + kMostRows - 1) / kMostRows);
  const int64_t cuts = std::clamp<int64_t>(wanted, 1, (rows + kFewestRows - 1) / kFewestRows);
  const int64_t most = ((rows + cuts - 1) / cuts + kRowsMultiple - 1) / kRowsMultiple * kRowsMultiple;
  on_threads(starts.back() * cuts, [&](auto take) {
    const Scratch<float> sums_of_rows(most * kMostColumns);
    const auto panels = std::make_unique<Panels>();
    for (int64_t task; (task = take()) < starts.back() * cuts;) {
      const int64_t block = task / cuts, first = task % cuts * most;
      const int64_t index = std::upper_bound(starts.begin(), starts.end(), block) - starts.begin() - 1;
      if (first < rows)
        results[index].block(block - starts[index], first, std::min(first + most, rows), *panels, sums_of_rows.data());
    }
  });
}

}  // namespace aletheia::fixed_point

#pragma GCC pop_options

#else

namespace aletheia::fixed_point {

class Left {};

bool serves(at::ScalarType, int64_t) { return false; }
std::shared_ptr<const Left> rounded(const at::Tensor&) { TORCH_CHECK(false, "built without AVX512-VNNI"); }
void multiply(const std::vector<Sum>&) { TORCH_CHECK(false, "built without AVX512-VNNI"); }

}  // namespace aletheia::fixed_point

#endif
