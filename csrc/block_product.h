// Bfloat16 products over a block of rows, with what follows done on the float32 sums while they are in registers.
//
//   epilogue(start + Σ_pieces a_piece[m, :] B_piece)      m in a block of rows, B packed in panels
//
// A piece is one addend: a frozen weight, or a low-rank factor, so that x Wᵀ + (s h) Bᵀ or dy_1 W_1 + dy_2 W_2 + g A is
// one sweep that writes its result once. On the shapes of small language models this reaches the rate of the vendor
// library's product, or passes it, which is why the base product is here as well.
//
// Where the instruction set in use has tile registers (amx.h) they hold the sums of 32 rows of two panels; else vector
// registers hold those of six rows of four.
//
// Only for translation units that check the processor first.
#pragma once

#include "amx.h"
#include "bf16_products.h"
#include "instruction_set.h"

#ifdef ALETHEIA_AVX512BF16

#include <algorithm>
#include <utility>

#include "tasks.h"
#include "transposed.h"

#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prfchw")

namespace aletheia {
namespace {

inline __mmask32 first_pairs_of_lanes(int64_t count) {
  return count >= 2 * kLanes ? __mmask32(~0u) : __mmask32((1u << std::max<int64_t>(count, 0)) - 1u);
}

// 32 elements of a row from column on as bfloat16, zero where the mask is.
template <bool kWide>
inline __m512i load_row(const void* row, int64_t column, __mmask32 mask) {
  if constexpr (!kWide) return _mm512_maskz_loadu_epi16(mask, static_cast<const bf16*>(row) + column);
  const float* source = static_cast<const float*>(row) + column;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), source);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> kLanes), source + kLanes);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Rows of a matrix, or of several stacked: float32 or bfloat16 with unit column stride.
struct Rows {
  std::vector<const void*> rows;
  int64_t length = 0;
  bool wide = false;

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  void append(const at::Tensor& t) {
    length = t.size(1);
    wide = t.scalar_type() == at::kFloat;
    append(t.const_data_ptr(), t.stride(0) * t.element_size(), t.size(0));
  }
  void append(const void* data, int64_t row_bytes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) rows.push_back(static_cast<const char*>(data) + i * row_bytes);
  }
  void prefetch(int64_t row, int64_t column) const {
    if (row < count()) _mm_prefetch(static_cast<const char*>(rows[row]) + column * (wide ? 4 : 2), _MM_HINT_T0);
  }
  __m512i load(int64_t row, int64_t column, __mmask32 mask) const {
    return wide ? load_row<true>(rows[row], column, mask) : load_row<false>(rows[row], column, mask);
  }
};

inline bool tile_registers_in_use() { return instruction_set() == InstructionSet::kAmxBf16; }

enum class Packing { kRows, kColumns };  // the source's rows are B's rows (the inner index), or B's columns

// How far ahead of its reader a line is fetched.
struct Lead {
  int64_t rows, columns;
};

// The order of 32 columns in two panels: as they are, or as they leave one instruction that pairs rows, in which
// columns 0-3 of every eight lie in the first panel and 4-7 in the second.
enum class Order { kColumns, kHalvesOfEight };

// Columns [first, end) of rows as panels, with zeros up to `padded` rows: the rows of each pair interleaved.
template <Order kOrder>
inline void interleave(
    const Rows& rows, int64_t first, int64_t end, int64_t padded, uint16_t* panels, int64_t stride, Lead lead) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const int64_t count = rows.count(), whole = first + (end - first) / (2 * kLanes) * (2 * kLanes);
  const auto pairs = [&](auto is_wide) __attribute__((always_inline)) {
    constexpr int64_t kBytes = is_wide ? 4 : 2;
    const auto put = [&](__m512i even, __m512i odd, uint16_t* target, bool both) __attribute__((always_inline)) {
      const __m512i a = _mm512_unpacklo_epi16(even, odd), b = _mm512_unpackhi_epi16(even, odd);
      if constexpr (kOrder == Order::kHalvesOfEight) {
        _mm512_storeu_si512(target, a);
        _mm512_storeu_si512(target + stride, b);
      } else {
        _mm512_storeu_si512(target, _mm512_permutex2var_epi32(a, low, b));
        if (both) _mm512_storeu_si512(target + stride, _mm512_permutex2var_epi32(a, high, b));
      }
    };
    constexpr __mmask32 kAll = ~__mmask32(0);
    for (int64_t k = 0; k < padded; k += 2) {
      const void* const even = rows.rows[std::min(k, count - 1)];
      const void* const odd = rows.rows[std::min(k + 1, count - 1)];
      const char* const ahead = static_cast<const char*>(rows.rows[std::min(k + lead.rows, count - 1)]);
      const char* const ahead_odd = static_cast<const char*>(rows.rows[std::min(k + 1 + lead.rows, count - 1)]);
      uint16_t* target = panels + k * kLanes;
      int64_t column = first;
      if (k + 1 < count)
        for (; column < whole; column += 2 * kLanes, target += 2 * stride) {
          _mm_prefetch(ahead + (column + lead.columns) * kBytes, _MM_HINT_T0);
          _mm_prefetch(ahead_odd + (column + lead.columns) * kBytes, _MM_HINT_T0);
          put(load_row<is_wide>(even, column, kAll), load_row<is_wide>(odd, column, kAll), target, true);
        }
      for (; column < end; column += 2 * kLanes, target += 2 * stride) {
        const __mmask32 mask = first_pairs_of_lanes(end - column);
        put(load_row<is_wide>(even, column, k < count ? mask : 0), load_row<is_wide>(odd, column, k + 1 < count ? mask : 0),
            target, column + kLanes < end);
      }
    }
  };
  if (rows.count() == 0) return;
  if (rows.wide)
    pairs(std::true_type{});
  else
    pairs(std::false_type{});
}

// Columns of a product: all of them, of weights that were packed before; or a unit's, for which a thread packs what it
// needs of the weights into memory of its own.
class Window {
 public:
  explicit Window(int64_t outer) : count(outer) {}
  Window(int64_t first, int64_t count, uint16_t* memory) : first(first), count(count), memory_(memory) {}

  uint16_t* take(int64_t elements) { return std::exchange(memory_, memory_ + elements); }

  const int64_t first = 0, count;

 private:
  uint16_t* memory_ = nullptr;
};

// When a weight's panels are written: all before the product, or a unit's as its columns are multiplied.
enum class When { kBefore, kByUnit };

// B packed in panels, and the work of packing it cut in units that any thread may do. Panels end in zeros up to a whole
// tile's inner indices.
class PackedB {
 public:
  PackedB(Rows source, Packing as, When when = When::kBefore) : source_(std::move(source)), as_(as), when_(when) {
    inner_ = as == Packing::kRows ? source_.count() : source_.length;
    outer_ = as == Packing::kRows ? source_.length : source_.count();
    padded_ = (inner_ + kTileInner - 1) / kTileInner * kTileInner;
    stride_ = padded_ * kLanes;
    if (when == When::kBefore) data_ = Scratch<uint16_t>((outer_ + kLanes - 1) / kLanes * stride_);
  }
  PackedB(const at::Tensor& t, Packing as, When when = When::kBefore) : PackedB(rows_of(t), as, when) { owner_ = t; }

  static constexpr int64_t kUnit = kMaxPanels * kLanes;  // columns

  Panels panels() const { return {data_.data(), stride_, inner_, outer_}; }
  // Those of a window's columns, which start with a panel.
  Panels panels(Window& window) const {
    if (when_ == When::kBefore) return {data_.data() + window.first / kLanes * stride_, stride_, inner_, window.count};
    uint16_t* const packed = window.take(unit_elements());
    pack(window.first, window.first + window.count, packed);
    return {packed, stride_, inner_, window.count};
  }
  int64_t unit_elements() const { return kMaxPanels * stride_; }
  int64_t units() const { return when_ == When::kBefore ? (outer_ + kUnit - 1) / kUnit : 0; }
  void pack(int64_t unit) const {
    pack(unit * kUnit, std::min(outer_, (unit + 1) * kUnit), data_.data() + unit * unit_elements());
  }

 private:
  static constexpr Lead kLead{16, 0};  // weights come from memory, and lines a row apart from no hardware prefetch

  static Rows rows_of(const at::Tensor& t) {
    Rows rows;
    rows.append(t);
    return rows;
  }
  void pack(int64_t first, int64_t end, uint16_t* target) const {
    if (as_ == Packing::kRows) return interleave<Order::kColumns>(source_, first, end, padded_, target, stride_, kLead);
    for (int64_t column = first; column < end; column += kLanes, target += stride_) pack_columns(column, target);
  }
  void pack_columns(int64_t first, uint16_t* target) const {
    const int64_t count = std::min(kLanes, outer_ - first);
    for (int64_t pair = 0; pair < padded_ / 2; pair += kLanes) {
      const __mmask32 mask = first_pairs_of_lanes(inner_ - 2 * pair);
      __m512i block[kLanes];
      for (int64_t n = 0; n < kLanes; ++n) {
        block[n] = n < count ? source_.load(first + n, 2 * pair, mask) : _mm512_setzero_si512();
        source_.prefetch(first + kLanes + n, 2 * pair);
      }
      transpose(block);
      for (int64_t j = 0; j < kLanes; ++j) _mm512_storeu_si512(target + (pair + j) * 2 * kLanes, block[j]);
    }
  }
  at::Tensor owner_;  // of the source's memory, which may be a copy that only this keeps
  Rows source_;
  Packing as_;
  When when_;
  int64_t inner_ = 0, padded_ = 0, outer_ = 0, stride_ = 0;
  Scratch<uint16_t> data_;
};

// Units of one job cost more than another's, and an adapter's next to nothing: threads take them from a common counter.
inline void pack_all(const std::vector<const PackedB*>& jobs) {
  std::vector<int64_t> ends;
  for (const PackedB* job : jobs) ends.push_back((ends.empty() ? 0 : ends.back()) + job->units());
  const int64_t units = ends.empty() ? 0 : ends.back();
  on_threads(units, [&](auto take) {
    for (int64_t unit; (unit = take()) < units;) {
      const auto job = std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin();
      jobs[job]->pack(unit - (job > 0 ? ends[job - 1] : 0));
    }
  });
}

// A packed weight that does not stay in cache costs three passes over memory beside its product, as much as 80 rows of
// it: read, written, and read again by every thread. By units, which threads take in turn, it is read once; rows then come
// from third-level cache for every unit, which does not pay where they are many and the weight is small. Measured on two
// cores (AMD, AVX512-BF16): a third less time at 32 rows, a tenth at 512 rows of a wide weight and nothing at 2,048,
// a tenth more at 2,048 rows of a small one. Tiles take rows that are in second-level cache, and read them anew for every
// two panels.
inline When when_to_pack(int64_t rows, int64_t columns, int64_t elements) {
  constexpr int64_t kFewRows = 256, kManyRows = 1536, kManyElements = 1 << 21;
  const bool pays = rows <= kFewRows || (rows <= kManyRows && elements >= kManyElements);
  const bool busy = columns >= at::get_num_threads() * PackedB::kUnit;
  return !tile_registers_in_use() && pays && busy ? When::kByUnit : When::kBefore;
}

// body(window) for every unit of the columns, the last few shared out panel by panel so that every thread has as many;
// each thread has memory for so many elements of packed weights.
template <typename Body>
void each_window(int64_t outer, int64_t elements, Body body) {
  const int64_t threads = at::get_num_threads(), panels = (outer + kLanes - 1) / kLanes;
  const int64_t whole = panels / (kMaxPanels * threads) * threads, left = panels - whole * kMaxPanels;
  const auto start = [=](int64_t unit) {
    return unit <= whole ? unit * kMaxPanels : whole * kMaxPanels + left * (unit - whole) / threads;
  };
  on_threads(whole + threads, [&](auto take) {
    const Scratch<uint16_t> memory(elements);
    for (int64_t unit; (unit = take()) < whole + threads;) {
      const int64_t first = start(unit) * kLanes, end = std::min(start(unit + 1) * kLanes, outer);
      if (first == end) continue;
      Window window(first, end - first, memory.data());
      body(window);
    }
  });
}

struct Piece {
  const bf16* a;
  int64_t lda;
  Panels b;
};

// A piece of a piece, short enough that four panels of it stay in second-level cache.
struct Stretch {
  const bf16* a;
  int64_t lda;
  const uint16_t* b;
  int64_t stride, inner;
};

// Sums of kRows rows of C against kPanels panels, [row][panel][lane] with room for kMaxPanels: from `before`, or else from
// start, plus the stretches, into `after`.
template <int kRows, int kPanels>
__attribute__((noinline)) void tile(
    const Stretch* begin, const Stretch* end, int64_t row, int64_t panel, const float* start, const float* before,
    float* after) {
  __m512 sum[kRows][kPanels];
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) {
    const __m512 first = start ? _mm512_loadu_ps(start + (panel + p) * kLanes) : _mm512_setzero_ps();
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m)
      sum[m][p] = before ? _mm512_load_ps(before + (m * kMaxPanels + p) * kLanes) : first;
  }
  for (const Stretch* s = begin; s != end; ++s) {
    const uint16_t* b = s->b + panel * s->stride;
    const int64_t stride = s->stride, lda = s->lda;
    const bf16* a = s->a + row * lda;
    const auto step = [&](const bf16* left, const uint16_t* right, bool half) __attribute__((always_inline)) {
      __m512i column[kPanels];
      for (int p = 0; p < kPanels; ++p) column[p] = _mm512_load_si512(right + p * stride);
      for (int m = 0; m < kRows; ++m) {
        uint32_t pair = 0;
        std::memcpy(&pair, left + m * lda, half ? 2 : 4);
        const __m512i both = _mm512_set1_epi32(static_cast<int>(pair));
        for (int p = 0; p < kPanels; ++p) sum[m][p] = multiply_add(sum[m][p], both, column[p]);
      }
    };
    const bf16* const whole = a + s->inner / 2 * 2;
    for (; a != whole; a += 2, b += 2 * kLanes) step(a, b, false);
    if (s->inner % 2) step(a, b, true);
  }
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p) _mm512_store_ps(after + (m * kMaxPanels + p) * kLanes, sum[m][p]);
}

inline auto tile_of(int64_t panels, int64_t rows) {
  static constexpr decltype(&tile<1, 1>) kTiles[][3] = {
      {tile<12, 1>, tile<4, 1>, tile<1, 1>},
      {tile<12, 2>, tile<4, 2>, tile<1, 2>},
      {tile<8, 3>, tile<4, 3>, tile<1, 3>},
      {tile<6, 4>, tile<4, 4>, tile<1, 4>}};
  return kTiles[panels - 1][rows > 4 ? 0 : rows == 4 ? 1 : 2];
}

// Fetches the next panels into second-level cache, a share after every strip of rows: a weight's panels come from
// third-level cache or memory once a block of rows, and the strips in between leave the time.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Stretch* begin, const Stretch* end, int64_t panel, int64_t last, int64_t strips)
      : stretch_(begin), end_(end), first_(panel), panel_(panel), last_(last) {
    int64_t lines = 0;
    for (const Stretch* s = begin; s != end; ++s) lines += (s->inner + 1) / 2 * std::max<int64_t>(last - panel, 0);
    share_ = (lines + strips - 1) / strips;
  }
  void fetch() {
    for (int64_t i = 0; i < share_ && stretch_ != end_; ++i) {
      _mm_prefetch(
          reinterpret_cast<const char*>(stretch_->b + panel_ * stretch_->stride + pair_ * 2 * kLanes), _MM_HINT_T1);
      if (++pair_ < (stretch_->inner + 1) / 2) continue;
      pair_ = 0;
      if (++panel_ < last_) continue;
      panel_ = first_;
      ++stretch_;
    }
  }

 private:
  const Stretch* stretch_ = nullptr;
  const Stretch* end_ = nullptr;
  int64_t first_ = 0, panel_ = 0, last_ = 0, pair_ = 0, share_ = 0;
};

constexpr int64_t kSweep = 2048;  // inner indices summed in registers before the sums are put aside

// One way to the sums of a strip of rows, [row][panel][lane] with room for kMaxPanels.
struct VectorStrips {
  static constexpr int64_t kPanels = kMaxPanels, kRows = 12, kInner = 2;
  static constexpr bool kEvenRows = false;

  Ahead ahead;

  // The fewer panels, the more rows it takes to keep the multipliers busy.
  static int64_t tall(int64_t panels) {
    static constexpr int64_t kTall[] = {12, 12, 8, 6};
    return kTall[panels - 1];
  }
  static int64_t height(int64_t tall, int64_t left) {
    return left >= tall && left != tall + 2 ? tall : left >= 4 ? 4 : 1;
  }
  void enter(const Stretch* begin, const Stretch* end, int64_t panel, int64_t panels, int64_t rows, int64_t tall) {
    ahead = Ahead(begin, end, panel + kPanels, std::min(panels, panel + 2 * kPanels), (rows + tall - 1) / tall);
  }
  template <typename Between>
  void sum(
      const Stretch* begin, const Stretch* end, int64_t row, int64_t rows, int64_t panel, int64_t panels,
      const float* start, const float* before, float* after, Between&& between) {
    between.fetch();
    tile_of(panels, rows)(begin, end, row, panel, start, before, after);
    ahead.fetch();
  }
};

// The same in tile registers.
struct TileStrips {
  static constexpr int64_t kPanels = 2, kRows = 2 * kTileRows, kInner = kTileInner;
  static constexpr bool kEvenRows = true;  // in every strip but the last

  TileRegisters registers;
  int64_t fetched = 0;
  bool passes_once = false;  // A, since B is no wider than a strip

  static int64_t tall(int64_t) { return kRows; }
  static int64_t height(int64_t tall, int64_t left) { return std::min(tall, left); }
  void enter(const Stretch*, const Stretch*, int64_t, int64_t panels, int64_t rows, int64_t tall) {
    fetched = rows > 4 * tall ? 4 : 8;
    passes_once = panels <= kPanels;
  }
  template <typename Between>
  void sum(
      const Stretch* begin, const Stretch* end, int64_t row, int64_t rows, int64_t panel, int64_t panels,
      const float* start, const float* before, float* after, Between&& between) {
    registers.shape(rows);
    if (start && !before) {
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t p = 0; p < panels; ++p)
          _mm512_store_ps(after + (m * kPanels + p) * kLanes, _mm512_loadu_ps(start + (panel + p) * kLanes));
      before = after;
    }
    const auto choose = [&](auto once) {
      return rows > kTileRows ? (panels == 2 ? strip<2, 2, once, Between> : strip<2, 1, once, Between>)
                              : (panels == 2 ? strip<1, 2, once, Between> : strip<1, 1, once, Between>);
    };
    const auto run = passes_once ? choose(std::true_type{}) : choose(std::false_type{});
    run(begin, end, row, panel, before, after, fetched, between);
  }

 private:
  static constexpr int64_t kLead = 8;

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
  template <int kBands, int kWidth, bool kOnce, typename Between>
  static __attribute__((noinline)) void strip(
      const Stretch* begin, const Stretch* end, int64_t row, int64_t panel, const float* before, float* after,
      int64_t fetched, Between&& between) {
    constexpr int64_t kSumRow = kPanels * kLanes, kSumBytes = kSumRow * sizeof(float), kBand = kTileRows * kSumRow;
    const auto each_sum = [&](auto visit) __attribute__((always_inline)) {
      visit(std::integral_constant<int, 0>{}, 0);
      if constexpr (kWidth == 2) visit(std::integral_constant<int, 1>{}, kLanes);
      if constexpr (kBands == 2) visit(std::integral_constant<int, 2>{}, kBand);
      if constexpr (kBands == 2 && kWidth == 2) visit(std::integral_constant<int, 3>{}, kBand + kLanes);
    };
    if (before)
      each_sum([&](auto tile, int64_t at) __attribute__((always_inline)) { tile_load<tile>(before + at, kSumBytes); });
    else
      each_sum([&](auto tile, int64_t) __attribute__((always_inline)) { tile_zero<tile>(); });
    // The lines of the next two panels that this strip fetches, its share of the block's every step: they come from
    // third-level cache or memory once a block of rows.
    constexpr int64_t kLine = 2 * kLanes;
    const int64_t part = row / kRows * fetched % (2 * kLanes);
    for (const Stretch* s = begin; s != end; ++s) {
      const uint16_t* b = s->b + panel * s->stride;
      const uint16_t* next = b + (2 + part / kLanes) * s->stride + part % kLanes * kLine;
      const bf16* a = s->a + row * s->lda;
      const int64_t row_bytes = s->lda * static_cast<int64_t>(sizeof(bf16)), band = kTileRows * s->lda, stride = s->stride;
      // What passes once comes from wherever it is, and rows apart from no hardware prefetch: its next lines, and past
      // the stretch's end those of the strip below.
      const int64_t lead = std::min(kLead * kTileInner, s->inner), below = kBands * band - s->inner;
      for (int64_t k = 0; k < s->inner; k += kTileInner, a += kTileInner) {
        if constexpr (kOnce) {
          const char* ahead = reinterpret_cast<const char*>(a + lead + (k + lead < s->inner ? 0 : below));
#pragma GCC unroll 32
          for (int m = 0; m < kBands * kTileRows; ++m, ahead += row_bytes) _mm_prefetch(ahead, _MM_HINT_T0);
        }
        tile_load<6>(b, 4 * kLanes);
        tile_load<4>(a, row_bytes);
        tile_multiply_add<0, 4, 6>();
        if constexpr (!kOnce)
          for (int64_t line = 0; line < fetched; ++line)
            _mm_prefetch(reinterpret_cast<const char*>(next + line * kLine), _MM_HINT_T1);
        if constexpr (kWidth == 2) {
          tile_load<7>(b + stride, 4 * kLanes);
          tile_multiply_add<1, 4, 7>();
        }
        between();
        if constexpr (kBands == 2) {
          tile_load<5>(a + band, row_bytes);
          tile_multiply_add<2, 5, 6>();
          if constexpr (kWidth == 2) tile_multiply_add<3, 5, 7>();
        }
        b += kTileInner * kLanes;
        next += kTileInner * kLanes;
      }
    }
    each_sum([&](auto tile, int64_t at) __attribute__((always_inline)) { tile_store<tile>(after + at, kSumBytes); });
  }
#pragma GCC pop_options
};

// An epilogue that takes the rows of a strip two by two, and is told when it has had every row of some columns.
template <typename Epilogue>
concept TwoByTwo = requires(Epilogue& epilogue, int64_t n, const float* sums) {
  epilogue.two_rows(n, n, n, n, sums, n);
};

// An epilogue that can fetch what it will read and write of a row, long before it is called: outputs lie in memory that
// was last touched a step ago.
template <typename Epilogue>
concept Fetches = requires(const Epilogue& epilogue, int64_t n) { epilogue.fetch(n, n); };

inline void fetch_to_write(const void* line) { __builtin_prefetch(line, 1, 3); }

// Rows that somebody reads after this product, and that may come near meanwhile: one after another in memory.
struct Errand {
  const char *line = nullptr, *end = nullptr;

  Errand() = default;
  Errand(const bf16* rows, int64_t ld, int64_t count, int64_t columns) {
    constexpr int64_t kMostSkipped = 2;  // of what lies between the rows, not much is worth fetching
    if (ld > kMostSkipped * columns) return;
    line = reinterpret_cast<const char*>(rows);
    end = reinterpret_cast<const char*>(rows + (count - 1) * ld + columns);
  }
};

class Errands {
 public:
  void add(const Errand& errand) { errands_.push_back(errand); }
  __attribute__((always_inline)) void run() {
    constexpr int64_t kLine = 64, kLinesAStep = 3;
    if (next_ == errands_.size()) return;
    Errand& errand = errands_[next_];
    for (int64_t i = 0; i < kLinesAStep; ++i) _mm_prefetch(errand.line + i * kLine, _MM_HINT_T1);
    errand.line += kLinesAStep * kLine;
    if (errand.line >= errand.end) ++next_;
  }

 private:
  std::vector<Errand> errands_;
  size_t next_ = 0;
};

// Sums of a strip on their way through an epilogue, which is cheapest a row or two at a time between a later strip's
// products: what it stores then waits for its lines while the multipliers work. So does what the strip in the making will
// read and write.
template <typename Strips, typename Epilogue>
struct Leaving {
  static constexpr bool kTwoByTwo = Strips::kEvenRows && TwoByTwo<Epilogue>;
  static constexpr int64_t kStride = Strips::kPanels * kLanes;

  Strips* strips;
  Epilogue* epilogue;
  Errands* errands;
  int64_t row = 0, end = 0, column = 0, columns = 0;
  const float* sums = nullptr;
  bool closes = false;
  int64_t coming = 0, coming_end = 0, coming_column = 0;

  void announce(int64_t first, int64_t count, int64_t at) {
    coming = first;
    coming_end = first + count;
    coming_column = at;
  }
  void start(int64_t first, int64_t count, int64_t at, int64_t width, const float* from, bool last) {
    row = first;
    end = first + count;
    column = at;
    columns = width;
    sums = from;
    closes = last;
  }
  __attribute__((always_inline)) void one() {
    (*epilogue)(row, column, columns, sums);
    ++row;
    sums += kStride;
  }
  // Every line of what the next rows of the strip in the making will read and write.
  __attribute__((always_inline)) void fetch(int64_t rows) {
    constexpr int64_t kLine = 2 * kLanes;
    if constexpr (Fetches<Epilogue>)
      for (const int64_t until = coming + rows; coming < until; ++coming)
        for (int64_t at = 0; at < kStride; at += kLine) epilogue->fetch(coming, coming_column + at);
  }
  void fetch() { fetch(coming_end - coming); }
  __attribute__((always_inline)) void operator()() {
    if (coming < coming_end) fetch(2);
    if (errands) errands->run();
    leave();
  }
  __attribute__((always_inline)) void leave() {
    if constexpr (kTwoByTwo) {
      if (row >= end) return;
      epilogue->two_rows(row, end - row, column, columns, sums, kStride);
      row += 2;
      sums += 2 * kStride;
    } else {
      if (row < end) one();
      if (row < end) one();
    }
  }
  void rest() {
    while (row < end) leave();
    if constexpr (kTwoByTwo)
      if (closes) epilogue->columns_done(*strips, column, columns);
    closes = false;
  }
};

// The product of one block of rows by one kind of strips, which see block_product.
template <typename Strips, typename Epilogue>
void product_by(
    Strips& strips, const Piece* pieces, size_t count, int64_t rows, int64_t outer, const float* start, Epilogue epilogue,
    Errands* errands) {
  std::vector<Stretch> stretches;
  std::vector<size_t> sweeps{0};
  std::vector<Scratch<bf16>> tails;
  int64_t held = 0;
  for (size_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    // What inner indices are left over from whole tiles lie between other things: they get a copy that ends in zeros, as
    // the panels do.
    const int64_t odd = Strips::kInner > 2 ? piece.b.inner % Strips::kInner : 0, whole = piece.b.inner - odd;
    for (int64_t k = 0; k < whole;) {
      if (held >= kSweep) {
        sweeps.push_back(stretches.size());
        held = 0;
      }
      // What is left after a sweep is not worth one of its own.
      int64_t inner = std::min(whole - k, kSweep - held);
      if (whole - k - inner < kSweep / 4) inner = whole - k;
      if (k + inner < whole) inner = (inner + Strips::kInner - 1) / Strips::kInner * Strips::kInner;
      stretches.push_back({piece.a + k, piece.lda, piece.b.data + k * kLanes, piece.b.stride, inner});
      k += inner;
      held += inner;
    }
    if (odd == 0) continue;
    bf16* const tail = tails.emplace_back(rows * kTileInner).data();
    for (int64_t m = 0; m < rows; ++m)
      _mm512_storeu_si512(
          tail + m * kTileInner, _mm512_maskz_loadu_epi16(first_pairs_of_lanes(odd), piece.a + m * piece.lda + whole));
    stretches.push_back({tail, kTileInner, piece.b.data + whole * kLanes, piece.b.stride, kTileInner});
    held += kTileInner;
  }
  sweeps.push_back(stretches.size());
  constexpr int64_t kPanels = Strips::kPanels, kRow = kPanels * kLanes;
  // Two strips' sums, or every row's when they wait for the next sweep.
  const bool wait = sweeps.size() > 2;
  const Scratch<float> sums(kRow * (wait ? rows : 2 * Strips::kRows));
  Leaving<Strips, Epilogue> leaving{&strips, &epilogue, errands};
  int64_t strip = 0;

  const int64_t panels = (outer + kLanes - 1) / kLanes;
  for (int64_t panel = 0; panel < panels; panel += kPanels)
    for (size_t sweep = 0; sweep + 1 < sweeps.size(); ++sweep) {
      const Stretch* const begin = stretches.data() + sweeps[sweep];
      const Stretch* const end = stretches.data() + sweeps[sweep + 1];
      const bool last = sweep + 2 == sweeps.size();
      const int64_t width = std::min(kPanels, panels - panel), tall = Strips::tall(width);
      const int64_t columns = std::min(kPanels * kLanes, outer - panel * kLanes);
      strips.enter(begin, end, panel, panels, rows, tall);
      for (int64_t row = 0, height = 0; row < rows; row += height, ++strip) {
        height = Strips::height(tall, rows - row);
        float* const target = sums.data() + (wait ? row : strip % 2 * Strips::kRows) * kRow;
        if (last) leaving.announce(row, height, panel * kLanes);
        strips.sum(begin, end, row, height, panel, width, start, sweep > 0 ? target : nullptr, target, leaving);
        leaving.rest();
        if (last) leaving.start(row, height, panel * kLanes, columns, target, row + height == rows);
      }
      if (wait) leaving.rest();
    }
  leaving.rest();
}

// The product of one block of rows. start: per column of the packed width, or null. epilogue(row, column, count, sums)
// gets count ≤ 64 sums of a row at a time, 64-byte aligned.
template <typename Epilogue>
void block_product(
    const Piece* pieces, size_t count, int64_t rows, int64_t outer, const float* start, Epilogue epilogue,
    Errands* errands = nullptr) {
  if (tile_registers_in_use()) {
    TileStrips strips;
    product_by(strips, pieces, count, rows, outer, start, epilogue, errands);
  } else {
    VectorStrips strips;
    product_by(strips, pieces, count, rows, outer, start, epilogue, errands);
  }
}

// Epilogues that only store.
struct store_bfloat16 {
  bf16* c;
  int64_t ldc;

  store_bfloat16(bf16* c, int64_t ldc) : c(c), ldc(ldc) {}
  void fetch(int64_t row, int64_t column) const { fetch_to_write(c + row * ldc + column); }
  __attribute__((always_inline)) void operator()(int64_t row, int64_t column, int64_t count, const float* sums) const {
    bf16* const target = c + row * ldc + column;
    for (int64_t k = 0; k < count; k += 2 * kLanes) {
      const __m512i both =
          (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + k + kLanes), _mm512_load_ps(sums + k));
      if (count - k >= 2 * kLanes)
        _mm512_storeu_si512(target + k, both);
      else
        _mm512_mask_storeu_epi16(target + k, first_pairs_of_lanes(count - k), both);
    }
  }
};
inline auto store_float(float* c, int64_t ldc) {
  return [=](int64_t row, int64_t column, int64_t count, const float* sums) __attribute__((always_inline)) {
    for (int64_t k = 0; k < count; k += kLanes)
      _mm512_mask_storeu_ps(c + row * ldc + column + k, first_lanes(count - k), _mm512_load_ps(sums + k));
  };
}
// each(position in the row-major C, mask, sums) for every register of sums.
template <typename Each>
inline auto for_each_register(int64_t ldc, Each each) {
  return [=](int64_t row, int64_t column, int64_t count, const float* sums) __attribute__((always_inline)) {
    for (int64_t k = 0; k < count; k += kLanes)
      each(row * ldc + column + k, first_lanes(count - k), _mm512_load_ps(sums + k));
  };
}

// Two tokens' values of 16 ranks from r on side by side, from float or bfloat16 rows; zero beyond the tokens.
template <typename T>
inline __m512i two_tokens(const T* values, int64_t ld, int64_t token, int64_t tokens, int64_t r, __mmask16 mask) {
  const auto load = [&](int64_t t) {
    if (t >= tokens) return _mm512_setzero_si512();
    if constexpr (std::is_same_v<T, float>)
      return _mm512_cvtepu16_epi32(narrow(_mm512_maskz_loadu_ps(mask, values + t * ld + r)));
    else
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values + t * ld + r));
  };
  return _mm512_or_si512(load(token), _mm512_slli_epi32(load(token + 1), 16));
}

// Pairs of every rank, as a column kernel broadcasts them.
template <typename T>
void pair_tokens(Scratch<uint32_t>& out, const T* values, int64_t ld, int64_t tokens, int64_t ranks) {
  for (int64_t token = 0; token < tokens; token += 2)
    for (int64_t r = 0; r < ranks; r += kLanes) {
      const __mmask16 mask = first_lanes(ranks - r);
      _mm512_mask_storeu_epi32(
          out.data() + token / 2 * ranks + r, mask, two_tokens(values, ld, token, tokens, r, mask));
    }
}

// Rows of so many inner indices that stay in second-level cache while panels pass, when tiles have all of them read anew
// for every two panels.
inline int64_t rows_in_cache(int64_t inner) {
  constexpr int64_t kMost = 256, kFewest = 64, kElements = 1 << 19;
  return tile_registers_in_use() ? std::clamp(kElements / std::max<int64_t>(inner, 1), kFewest, kMost) : kMost;
}

// Blocks of at most so many rows, in runs of a few that threads take from a common counter: on a shared machine a thread that is held up
// does less. What is summed over rows is summed once a run, so that it does not depend on which thread took which.
struct Blocks {
  int64_t rows, size, run, runs;

  Blocks(int64_t rows, int64_t most) : rows(rows) {
    // As many for every thread, in whole strips.
    const int64_t threads = at::get_num_threads(), rounds = (rows + most * threads - 1) / (most * threads);
    const int64_t even = (rows + threads * rounds - 1) / std::max<int64_t>(threads * rounds, 1);
    const int64_t strip = tile_registers_in_use() ? TileStrips::kRows : 4;
    size = std::max<int64_t>((even + strip - 1) / strip * strip, 12);
    const int64_t count = (rows + size - 1) / size;
    run = std::max<int64_t>((rounds + 1) / 2, 1);
    runs = (count + run - 1) / run;
  }
  // How many rows the block after that of row `first` has, if the same thread does it next; else 0.
  int64_t rows_after(int64_t first) const {
    const int64_t end = std::min(rows, (first / (run * size) + 1) * run * size);
    return std::max<int64_t>(std::min(size, end - first - size), 0);
  }
  template <typename Body>  // body(run, whether its first block, first row, number of rows)
  void each(Body body) const {
    on_threads(runs, [&](auto take) {
      for (int64_t taken; (taken = take()) < runs;)
        for (int64_t first = taken * run * size; first < std::min(rows, (taken + 1) * run * size); first += size)
          body(taken, first == taken * run * size, first, std::min(size, rows - first));
    });
  }
};

}  // namespace
}  // namespace aletheia

#pragma GCC pop_options

#endif
