// The one source of the kernels of low_rank_kernels.h. A translation unit for an instruction set defines
//
//   ALETHEIA_LANES      floats in a register
//   ALETHEIA_REGISTERS  how many there are
//   ALETHEIA_KERNELS    the name of its KernelSet
//   ALETHEIA_MULTIPLY_WORDS  where there is one: the instruction that multiplies the low words of 64-bit lanes
//
// includes low_rank_kernels.h, turns its instruction set on, and includes this file. Everything is in an anonymous
// namespace and nothing of another header is called but intrinsics: the object has no symbol that code for another
// processor could be linked to.

namespace aletheia::low_rank {
namespace {

using c10::BFloat16;

constexpr int64_t kLanes = ALETHEIA_LANES;
constexpr int64_t kWidth = 2 * kLanes;                  // columns of a panel of rows
constexpr int kSums = ALETHEIA_REGISTERS == 32 ? 24 : 12;  // registers that hold sums; the rest hold operands
constexpr int kMaxPanels = 4;                           // panels of B that a row kernel goes along
constexpr int kMaxRanks = kSums / 2;                    // ranks of C that a column kernel holds, two registers each
constexpr int64_t kAhead = 256;                         // bytes by which a row is asked for before it is read

// GCC's vectors: an operator is an instruction. Unaligned and aliasing where they are memory.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Longs __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef Floats FloatsInMemory __attribute__((aligned(4), may_alias));
typedef Ints IntsInMemory __attribute__((aligned(4), may_alias));
typedef Halves HalvesInMemory __attribute__((aligned(2), may_alias));

#define ALETHEIA_INLINE __attribute__((always_inline)) inline

ALETHEIA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

ALETHEIA_INLINE Floats load_vector(const float* p) { return *reinterpret_cast<const FloatsInMemory*>(p); }
ALETHEIA_INLINE Floats load_vector(const BFloat16* p) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const HalvesInMemory*>(p), Words) << 16);
}
ALETHEIA_INLINE void store_vector(Floats value, float* p) { *reinterpret_cast<FloatsInMemory*>(p) = value; }
ALETHEIA_INLINE void store_vector(Floats value, BFloat16* p) {  // to the nearest, ties to even; a NaN stays one
  const Words u = (Words)value;
  const Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Ints is_nan = (Ints)(u & 0x7fffffff) > 0x7f800000;
  const Words result = is_nan ? (u >> 16) | 0x40 : rounded;
  *reinterpret_cast<HalvesInMemory*>(p) = __builtin_convertvector(result, Halves);
}

// The first `count` < kLanes of a vector's elements, through a full vector of them.
template <typename T>
ALETHEIA_INLINE Floats load_some(const T* p, int64_t count) {
  T buffer[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) buffer[lane] = lane < count ? p[lane] : T{};
  return load_vector(buffer);
}
template <typename T>
ALETHEIA_INLINE void store_some(Floats value, T* p, int64_t count) {
  T buffer[kLanes];
  store_vector(value, buffer);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = buffer[lane];
}

// Products of the low words of each lane; what is above them is ignored.
ALETHEIA_INLINE Longs multiply_words(Longs a, uint32_t b) {
#ifdef ALETHEIA_MULTIPLY_WORDS
  return (Longs)ALETHEIA_MULTIPLY_WORDS(a, Longs{} + b);
#else
  return (a & 0xffffffff) * b;
#endif
}

// All ones where an element is kept, all zeros where it is dropped, made a stretch at a time.
class Keep {
 public:
  static constexpr int64_t kStretch = 256;  // elements; a multiple of every kWidth

  ALETHEIA_INLINE explicit Keep(const Mask& mask) : mask_(mask) {
    for (int64_t lane = 0; lane < kLanes / 2; ++lane) lanes_[lane] = static_cast<uint64_t>(lane);
  }

  // For elements [first, first + count), count <= kStretch: word i % 4 of counter i / 4 of the stream in philox.h, a
  // counter a 64-bit lane, of which the low half is what counts.
  ALETHEIA_INLINE const int32_t* operator()(int64_t first, int64_t count) {
    const int64_t skipped = first & 3;
    Longs counter = lanes_ + static_cast<uint64_t>(first >> 2);
    for (int64_t begin = 0; begin < skipped + count; begin += kWidth, counter += kLanes / 2) {
      Longs c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
      uint32_t k0 = static_cast<uint32_t>(mask_.seed), k1 = static_cast<uint32_t>(mask_.seed >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const Longs p0 = multiply_words(c0, 0xD2511F53u), p1 = multiply_words(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ k0;
        c2 = (p0 >> 32) ^ c3 ^ k1;
        c1 = p1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      const Longs low = (c0 & 0xffffffff) | c1 << 32, high = (c2 & 0xffffffff) | c3 << 32;
#if ALETHEIA_LANES == 4
      const Longs words[2] = {{low[0], high[0]}, {low[1], high[1]}};
#elif ALETHEIA_LANES == 8
      const Longs words[2] = {{low[0], high[0], low[1], high[1]}, {low[2], high[2], low[3], high[3]}};
#else
      const Longs words[2] = {
          {low[0], high[0], low[1], high[1], low[2], high[2], low[3], high[3]},
          {low[4], high[4], low[5], high[5], low[6], high[6], low[7], high[7]}};
#endif
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<IntsInMemory*>(keep_ + begin + half * kLanes) = (Words)words[half] >= mask_.threshold;
    }
    return keep_ + skipped;
  }

  ALETHEIA_INLINE static Floats apply(const int32_t* keep, Floats value) {
    return (Floats)((Ints)value & *reinterpret_cast<const IntsInMemory*>(keep));
  }

 private:
  const Mask mask_;
  Longs lanes_;
  int32_t keep_[kStretch + 2 * kWidth] = {};  // what is skipped, a stretch, and what completes the last registers
};

// No lambdas where there are vectors: GCC compiles one in a template for the baseline, before the target is known.
template <typename T>
void load(const T* in, int64_t ld, int64_t rows, int64_t columns, const Mask* mask, float* panels) {
  const int64_t padded = (columns + kWidth - 1) / kWidth * kWidth;
  Keep keep(mask != nullptr ? *mask : Mask{});
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t begin = 0; begin < padded; begin += Keep::kStretch) {
      const int64_t end = smaller(begin + Keep::kStretch, padded);
      const int32_t* kept = mask != nullptr ? keep(mask->first + m * columns + begin, end - begin) : nullptr;
      for (int64_t k = begin; k < end; k += kLanes) {
        const T* source = in + m * ld + k;
        Floats value = {};
        if (k + kLanes <= columns) {
          value = load_vector(source);
        } else if (k < columns) {
          value = load_some(source, columns - k);
        }
        if (mask != nullptr) value = Keep::apply(kept + k - begin, value * mask->scale);
        store_vector(value, panels + k / kWidth * kTokens * kWidth + m * kWidth + k % kWidth);
      }
    }
}

template <bool kAdd, typename T>
ALETHEIA_INLINE void put(Floats value, T* c, int64_t columns) {
  if (columns >= kLanes) {
    if constexpr (kAdd) value += load_vector(c);
    store_vector(value, c);
  } else {
    if constexpr (kAdd) value += load_some(c, columns);
    store_some(value, c, columns);
  }
}

// kRows rows of C against kPanels panels of B.
template <int kRows, int kPanels, bool kAdd, typename T>
ALETHEIA_INLINE void row_kernel(Rows a, Packed b, int64_t panel, T* c, int64_t ldc) {
  Floats sum[kRows][kPanels] = {};
  const float* columns = b.data + panel * b.inner * kLanes;
  const float* left = a.data;
  for (int64_t begin = 0; begin < b.inner; begin += kWidth, left += a.panel) {
    const int64_t count = smaller(kWidth, b.inner - begin);
    for (int64_t k = 0; k < count; ++k, columns += kLanes) {
      Floats right[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) right[p] = load_vector(columns + p * b.inner * kLanes);
#pragma GCC unroll 24
      for (int m = 0; m < kRows; ++m) {
        const float value = left[m * a.row + k];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) sum[m][p] += value * right[p];
      }
    }
  }
#pragma GCC unroll 24
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
      put<kAdd>(sum[m][p], c + m * ldc + (panel + p) * kLanes, b.outer - (panel + p) * kLanes);
}

// C [rows, b.outer] = or += a B: strips of rows from end to end, so that what is added to is read in order.
template <int kRows, int kPanels, bool kAdd, typename T>
void row_strip(Rows a, Packed b, int64_t first, int64_t last, T* c, int64_t ldc) {
  int64_t panel = first;
  for (; panel + kPanels <= last; panel += kPanels) row_kernel<kRows, kPanels, kAdd>(a, b, panel, c, ldc);
  if constexpr (kPanels > 1)
    if (panel < last) row_strip<kRows, kPanels - 1, kAdd>(a, b, panel, last, c, ldc);
}

template <int kPanels, bool kAdd, typename T>
void row_strips(Rows a, int64_t rows, Packed b, int64_t panels, T* c, int64_t ldc) {
  constexpr int kRows = kSums / kPanels < 12 ? kSums / kPanels : 12;
  static_assert(kTokens % kRows == 0);
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows, a.data += kRows * a.row)
    row_strip<kRows, kPanels, kAdd>(a, b, 0, panels, c + m * ldc, ldc);
  for (; m < rows; ++m, a.data += a.row) row_strip<1, kPanels, kAdd>(a, b, 0, panels, c + m * ldc, ldc);
}

template <bool kAdd, typename T>
void rows_product(Rows a, int64_t rows, Packed b, T* c, int64_t ldc) {
  const int64_t panels = (b.outer + kLanes - 1) / kLanes;
  switch (panels) {
    case 1: row_strips<1, kAdd>(a, rows, b, panels, c, ldc); break;
    case 2: row_strips<2, kAdd>(a, rows, b, panels, c, ldc); break;
    case 3: row_strips<3, kAdd>(a, rows, b, panels, c, ldc); break;
    default: row_strips<kMaxPanels, kAdd>(a, rows, b, panels, c, ldc); break;
  }
}

// One panel's columns of kRanks rows of C, the panel's rows `row` elements apart.
template <int kRanks, typename T>
void column_kernel(const float* c, int64_t ldc, int64_t tokens, const T* z, int64_t row, float* sums) {
  Floats low[kRanks], high[kRanks];
#pragma GCC unroll 12
  for (int r = 0; r < kRanks; ++r) {
    low[r] = load_vector(sums + r * kWidth);
    high[r] = load_vector(sums + r * kWidth + kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const Floats first = load_vector(z + t * row), second = load_vector(z + t * row + kLanes);
    if (row > kWidth) __builtin_prefetch(z + t * row + kAhead / sizeof(T));
#pragma GCC unroll 12
    for (int r = 0; r < kRanks; ++r) {
      const float value = c[t * ldc + r];
      low[r] += value * first;
      high[r] += value * second;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRanks; ++r) {
    store_vector(low[r], sums + r * kWidth);
    store_vector(high[r], sums + r * kWidth + kLanes);
  }
}

template <int kRanks, typename T>
ALETHEIA_INLINE void column_kernel_of(
    int64_t ranks, const float* c, int64_t ldc, int64_t tokens, const T* z, int64_t row, float* sums) {
  if (ranks == kRanks) return column_kernel<kRanks>(c, ldc, tokens, z, row, sums);
  if constexpr (kRanks > 1) column_kernel_of<kRanks - 1>(ranks, c, ldc, tokens, z, row, sums);
}

template <typename T>
ALETHEIA_INLINE void column_kernels(
    const float* c, int64_t ldc, int64_t ranks, int64_t tokens, const T* z, int64_t row, float* sums) {
  const int64_t passes = (ranks + kMaxRanks - 1) / kMaxRanks;
  for (int64_t pass = 0, rank = 0; pass < passes; ++pass) {
    const int64_t count = (ranks - rank + passes - pass - 1) / (passes - pass);
    column_kernel_of<kMaxRanks>(count, c + rank, ldc, tokens, z, row, sums + rank * kWidth);
    rank += count;
  }
}

void columns_product(
    const float* c, int64_t ldc, int64_t ranks, int64_t tokens, const float* z, int64_t columns, float* sums) {
  for (int64_t column = 0; column < columns; column += kWidth, z += kTokens * kWidth, sums += ranks * kWidth)
    column_kernels(c, ldc, ranks, tokens, z, kWidth, sums);
}

template <typename T>
void columns_of_rows(
    const float* c, int64_t ldc, int64_t ranks, int64_t tokens, const T* z, int64_t ld, int64_t columns, float* sums) {
  for (; columns >= kWidth; columns -= kWidth, z += kWidth, sums += ranks * kWidth)
    column_kernels(c, ldc, ranks, tokens, z, ld, sums);
  if (columns == 0) return;
  float panel[kTokens * kWidth];
  load(z, ld, tokens, columns, nullptr, panel);
  column_kernels(c, ldc, ranks, tokens, panel, kWidth, sums);
}

template <typename T>
void add_masked(const float* in, int64_t count, const Mask& mask, T* out) {
  Keep keep(mask);
  for (int64_t begin = 0; begin < count; begin += Keep::kStretch) {
    const int64_t end = smaller(begin + Keep::kStretch, count);
    const int32_t* kept = keep(mask.first + begin, end - begin);
    for (int64_t e = begin; e < end; e += kLanes) {
      const Floats value = e + kLanes <= end ? load_vector(in + e) : load_some(in + e, end - e);
      put<true>(Keep::apply(kept + e - begin, value * mask.scale), out + e, end - e);
    }
  }
}

template <typename T>
void narrow(const float* in, int64_t count, T* out) {
  for (int64_t e = 0; e < count; e += kLanes)
    put<false>(e + kLanes <= count ? load_vector(in + e) : load_some(in + e, count - e), out + e, count - e);
}

template <typename T>
constexpr Kernels<T> kernels() {
  return {&load<T>, &rows_product<false, float>, &rows_product<true, T>, &columns_product, &columns_of_rows<T>,
          &add_masked<T>, &narrow<T>};
}

}  // namespace
}  // namespace aletheia::low_rank

#include "softmax_vec.h"

namespace aletheia::low_rank {

constexpr KernelSet ALETHEIA_KERNELS = {
    kLanes, &softmax, &softmax_backward, kernels<float>(), kernels<BFloat16>()};

}  // namespace aletheia::low_rank
