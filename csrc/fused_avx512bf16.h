// What the fused operators share: adapters packed for every product they enter, and the sums of their gradients.
#pragma once

#include <ATen/ops/empty.h>

#include "block_product.h"
#include "fused.h"

#ifdef ALETHEIA_AVX512BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia {
namespace {

constexpr int64_t kTokens = 64;  // tokens interleaved at a time: a few thousand features of them fit second-level cache

// W as the B of x Wᵀ (forward) and of dy W (backward), whichever way it lies in memory.
inline PackedB forward_weight(const at::Tensor& w, When when) {
  return w.stride(1) != 1 && w.stride(0) == 1 ? PackedB(w.t(), Packing::kRows, when)
                                              : PackedB(with_unit_columns(w), Packing::kColumns, when);
}
inline PackedB backward_weight(const at::Tensor& w, When when) {
  return w.stride(1) != 1 && w.stride(0) == 1 ? PackedB(w.t(), Packing::kColumns, when)
                                              : PackedB(with_unit_columns(w), Packing::kRows, when);
}
inline When when_to_pack(int64_t rows, at::TensorList weights) {
  int64_t columns = 0, elements = 0;
  for (const at::Tensor& w : weights) {
    columns = std::max(columns, std::min(w.size(0), w.size(1)));
    elements += w.numel();
  }
  return when_to_pack(rows, columns, elements);
}

// Float32 or bfloat16 with unit columns, all alike.
inline std::vector<at::Tensor> readable(at::TensorList tensors) {
  const bool narrow_all = std::all_of(
      tensors.begin(), tensors.end(), [](const at::Tensor& t) { return t.scalar_type() == at::kBFloat16; });
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(with_unit_columns(narrow_all ? t : t.to(at::kFloat)));
  return out;
}

// Adapters that read one input: where each one's ranks lie side by side, and its factors as float32 or bfloat16 rows.
struct Adapters {
  std::vector<at::Tensor> As, Bs;
  std::vector<int64_t> offsets;
  std::vector<float> scale_of_rank;
  int64_t ranks, padded;

  Adapters(at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings)
      : As(readable(lora_As)), Bs(readable(lora_Bs)), offsets(offsets_of(lora_As, 0)), ranks(offsets.back()),
        padded((ranks + kLanes - 1) / kLanes * kLanes) {
    scale_of_rank.resize(padded, 0.0f);
    for (size_t i = 0; i < As.size(); ++i)
      std::fill(
          scale_of_rank.begin() + offsets[i], scale_of_rank.begin() + offsets[i + 1], static_cast<float>(scalings[i]));
  }
  int64_t rank(size_t i) const { return offsets[i + 1] - offsets[i]; }
  PackedB stacked_A(Packing as) const {
    Rows rows;
    for (const at::Tensor& A : this->As) rows.append(A);
    return PackedB(std::move(rows), as);
  }
  PackedB B(size_t i, Packing as) const { return PackedB(Bs[i], as); }

  // s h, rounded: the left factor of every expand product.
  void scale(const float* h, int64_t ldh, int64_t tokens, bf16* out) const {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < ranks; r += kLanes) {
        const __mmask16 mask = first_lanes(ranks - r);
        const __m512 value = _mm512_maskz_loadu_ps(mask, h + t * ldh + r);
        _mm256_mask_storeu_epi16(
            out + t * ranks + r, mask, narrow(_mm512_mul_ps(value, _mm512_loadu_ps(scale_of_rank.data() + r))));
      }
  }
  // g_i = s_i dy_i B_i for one block, into columns [offset_i, offset_i + r_i) of g [tokens, ranks].
  void project(size_t i, const bf16* dy, int64_t ld, int64_t tokens, const PackedB& B, bf16* g) const {
    const Piece piece{dy, ld, B.panels()};
    const __m512 s = _mm512_set1_ps(rank(i) > 0 ? scale_of_rank[offsets[i]] : 0.0f);
    bf16* const target = g + offsets[i];
    block_product(
        &piece, 1, tokens, rank(i), nullptr,
        for_each_register(ranks, [=](int64_t at, __mmask16 mask, __m512 sum) __attribute__((always_inline)) {
          _mm256_mask_storeu_epi16(target + at, mask, narrow(_mm512_mul_ps(sum, s)));
        }));
  }
};

// Gradients of low-rank factors: sums over tokens, one copy a run of blocks so that the result does not depend on which
// thread took which. A factor's sums [ranks, columns] lie as [columns / 32][ranks][32], which is how both kinds of
// registers leave them, whole lines one after another; tile registers leave the 32 in halves of eight.
class TokenSums {
 public:
  static constexpr int64_t kColumns = 2 * kLanes;
  static int64_t size(int64_t ranks, int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns * ranks; }

  TokenSums(int64_t runs, int64_t elements) : runs_(runs), elements_(elements), data_(runs * elements) {}

  float* of(int64_t run) const { return data_.data() + run * elements_; }

  // The gradient of `like`: rows [first, first + r) of the factor at offset, which has `ranks` rows, times scale. like is
  // [r, columns], or [columns, r] if transposed. Written by write().
  void want(
      int64_t offset, int64_t ranks, int64_t first, bool transposed, double scale, const at::Tensor& like,
      std::vector<at::Tensor>& into) {
    at::Tensor out = at::empty(like.sizes(), like.options().dtype(at::kFloat));
    jobs_.push_back(
        {data_.data() + offset + first * kColumns, out.mutable_data_ptr<float>(), ranks, like.size(transposed ? 1 : 0),
         like.size(transposed ? 0 : 1), static_cast<float>(scale), transposed});
    into.push_back(std::move(out));
  }
  void write() const {
    std::vector<int64_t> ends;
    for (const Job& job : jobs_)
      ends.push_back((ends.empty() ? 0 : ends.back()) + (job.columns + kColumns - 1) / kColumns);
    at::parallel_for(0, ends.empty() ? 0 : ends.back(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const auto job = std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin();
        write(jobs_[job], unit - (job > 0 ? ends[job - 1] : 0));
      }
    });
  }

 private:
  struct Job {
    const float* source;
    float* out;
    int64_t ranks, count, columns;
    float scale;
    bool transposed;
  };
  void write(const Job& job, int64_t unit) const {
    const __m512 scale = _mm512_set1_ps(job.scale);
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t r = 0; r < job.count; r += kLanes) {
      const int64_t count = std::min(kLanes, job.count - r);
      __m512i sums[2][kLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const float* source = job.source + unit * kColumns * job.ranks + (r + i) * kColumns;
        __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
        for (int64_t run = 0; run < runs_; ++run) {
          first = _mm512_add_ps(first, _mm512_loadu_ps(source + run * elements_));
          second = _mm512_add_ps(second, _mm512_loadu_ps(source + run * elements_ + kLanes));
        }
        first = _mm512_mul_ps(first, scale);
        second = _mm512_mul_ps(second, scale);
        sums[0][i] = _mm512_castps_si512(in_halves_ ? _mm512_permutex2var_ps(first, low, second) : first);
        sums[1][i] = _mm512_castps_si512(in_halves_ ? _mm512_permutex2var_ps(first, high, second) : second);
      }
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t column = unit * kColumns + half * kLanes, columns = std::min(kLanes, job.columns - column);
        if (columns <= 0) break;
        if (job.transposed) {
          transpose(sums[half]);
          for (int64_t i = 0; i < columns; ++i)
            _mm512_mask_storeu_epi32(job.out + (column + i) * job.count + r, first_lanes(count), sums[half][i]);
        } else {
          for (int64_t i = 0; i < count; ++i)
            _mm512_mask_storeu_epi32(job.out + (r + i) * job.columns + column, first_lanes(columns), sums[half][i]);
        }
      }
    }
  }

  const bool in_halves_ = tile_registers_in_use();
  int64_t runs_, elements_;
  Scratch<float> data_;
  std::vector<Job> jobs_;
};

inline void to_dtype_of(at::TensorList likes, std::vector<at::Tensor>& gradients) {
  for (size_t i = 0; i < gradients.size(); ++i) gradients[i] = gradients[i].to(likes[i].scalar_type());
}

// left [ranks, ld] = cᵀ in bfloat16, zero beyond the tokens; ld ≥ tokens is a multiple of 2 kLanes.
template <typename T>
void transpose_tokens(const T* c, int64_t ldc, int64_t tokens, int64_t ranks, bf16* left, int64_t ld) {
  for (int64_t r = 0; r < ranks; r += kLanes) {
    const __mmask16 mask = first_lanes(ranks - r);
    for (int64_t t = 0; t < ld; t += 2 * kLanes) {
      __m512i block[kLanes];
      for (int64_t pair = 0; pair < kLanes; ++pair) block[pair] = two_tokens(c, ldc, t + 2 * pair, tokens, r, mask);
      transpose(block);
      for (int64_t i = 0; i < std::min(kLanes, ranks - r); ++i) _mm512_storeu_si512(left + (r + i) * ld + t, block[i]);
    }
  }
}

// 32 columns of C [ranks, columns] = or += left z, both over `padded` tokens: z as two panels.
inline void tile_columns(
    TileStrips& strips, const bf16* left, int64_t padded, int64_t ranks, const uint16_t* panels, int64_t stride, bool add,
    float* C) {
  const Stretch stretch{left, padded, panels, stride, padded};
  const auto nothing = [] {};
  for (int64_t r = 0; r < ranks; r += TileStrips::kRows) {
    float* const sums = C + r * TokenSums::kColumns;
    strips.sum(
        &stretch, &stretch + 1, r, std::min(ranks - r, TileStrips::kRows), 0, 2, nullptr, add ? sums : nullptr, sums,
        nothing);
  }
}

// A part of the 32 columns of C, soon to be added to.
inline void fetch_sums(const float* C, int64_t ranks, int64_t part, int64_t parts) {
  const int64_t lines = ranks * TokenSums::kColumns / kLanes;
  for (int64_t line = part; line < lines; line += parts) fetch_to_write(C + line * kLanes);
}

// The same for z that arrives by itself, two rows of 32 columns at a time, in tile registers.
class ArrivingColumns {
 public:
  // c [tokens, ranks], C as TokenSums has it.
  template <typename T>
  ArrivingColumns(bool add, const T* c, int64_t ldc, int64_t ranks, int64_t tokens, float* C)
      : add_(add), ranks_(ranks), padded_((tokens + kTileInner - 1) / kTileInner * kTileInner), C_(C),
        left_(ranks * padded_), panels_(2 * padded_ * kLanes) {
    transpose_tokens(c, ldc, tokens, ranks, left_.data(), padded_);
    for (int64_t panel = 0; panel < 2; ++panel)
      std::fill(row(panel, (tokens + 1) / 2 * 2), row(panel, padded_), uint16_t{0});
  }
  bool wanted() const { return ranks_ > 0; }
  // Row t is even.
  __attribute__((always_inline)) void put(int64_t t, __m512i even, __m512i odd) const {
    _mm512_storeu_si512(row(0, t), _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(row(1, t), _mm512_unpackhi_epi16(even, odd));
  }
  // The given part of so many of what multiply() adds to: sums of a wide MLP do not stay in cache from block to block.
  void fetch(int64_t column, int64_t part, int64_t parts) const { fetch_sums(C_ + column * ranks_, ranks_, part, parts); }
  void multiply(TileStrips& strips, int64_t column) const {
    if (wanted())
      tile_columns(strips, left_.data(), padded_, ranks_, panels_.data(), padded_ * kLanes, add_, C_ + column * ranks_);
  }

 private:
  uint16_t* row(int64_t panel, int64_t t) const { return panels_.data() + (panel * padded_ + t) * kLanes; }

  bool add_;
  int64_t ranks_, padded_;
  float* C_;
  Scratch<bf16> left_;
  Scratch<uint16_t> panels_;
};

// One thread's buffers for Σ_t c[t, :]ᵀ z[t, :] over a block of rows.
class Columns {
 public:
  explicit Columns(int64_t ranks)
      : tiles_(tile_registers_in_use()), pairs_(tiles_ ? 0 : kTokens / 2 * ranks),
        left_(tiles_ ? kTileTokens * ranks : 0), panels_(tiles_ ? kTileTokens * kUnit : 0) {}

  // C [ranks, columns], as TokenSums has it, = or += cᵀ z
  template <typename T>
  void product(
      bool add, const T* c, int64_t ldc, int64_t ranks, const bf16* rows, int64_t ld, int64_t tokens, int64_t columns,
      float* C) {
    if (ranks == 0) return;
    if (!tiles_ && !add) std::memset(C, 0, TokenSums::size(ranks, columns) * sizeof(float));
    const int64_t most = tiles_ ? kTileTokens : kTokens;
    for (int64_t t = 0; t < tokens; t += most) {
      const int64_t count = std::min(most, tokens - t);
      if (tiles_)
        by_tiles(c + t * ldc, ldc, ranks, rows + t * ld, ld, count, columns, add || t > 0, C);
      else
        by_vectors(c + t * ldc, ldc, ranks, rows + t * ld, ld, count, columns, C);
    }
  }

 private:
  static constexpr int64_t kTileTokens = 128, kUnit = kMaxPanels * kLanes;

  template <typename T>
  void by_vectors(
      const T* c, int64_t ldc, int64_t ranks, const bf16* rows, int64_t ld, int64_t tokens, int64_t columns, float* C) {
    pair_tokens(pairs_, c, ldc, tokens, ranks);
    interleaved_.load(rows, ld, tokens, columns);
    columns_product(pairs_.data(), ranks, interleaved_, columns, C);
  }
  // A few columns of z at a time, so that they are multiplied while they are in first-level cache.
  template <typename T>
  void by_tiles(
      const T* c, int64_t ldc, int64_t ranks, const bf16* rows, int64_t ld, int64_t tokens, int64_t columns, bool add,
      float* C) {
    const int64_t padded = (tokens + kTileInner - 1) / kTileInner * kTileInner, stride = padded * kLanes;
    transpose_tokens(c, ldc, tokens, ranks, left_.data(), padded);
    Rows source;
    source.append(rows, ld * static_cast<int64_t>(sizeof(bf16)), tokens);
    TileStrips strips;
    for (int64_t unit = 0; unit < columns; unit += kUnit) {
      const int64_t end = std::min(columns, unit + kUnit);
      for (int64_t column = unit; column < end; column += TokenSums::kColumns)
        fetch_sums(C + column * ranks, ranks, 0, 1);
      interleave<Order::kHalvesOfEight>(source, unit, end, padded, panels_.data(), stride, {0, kUnit});
      for (int64_t column = unit; column < end; column += TokenSums::kColumns)
        tile_columns(
            strips, left_.data(), padded, ranks, panels_.data() + (column - unit) / kLanes * stride, stride, add,
            C + column * ranks);
    }
  }

  bool tiles_;
  Interleaved interleaved_;
  Scratch<uint32_t> pairs_;
  Scratch<bf16> left_;
  Scratch<uint16_t> panels_;
};

// Null where there is none, from column `first` on.
inline const float* from(const Scratch<float>& bias, int64_t first) { return bias.data() ? bias.data() + first : nullptr; }

inline Scratch<float> padded_bias(const std::optional<at::Tensor>& bias, int64_t outer) {
  if (!bias.has_value()) return {};
  const int64_t padded = (outer + kLanes - 1) / kLanes * kLanes;
  Scratch<float> out(padded);
  const at::Tensor wide = bias->to(at::kFloat).contiguous();
  std::copy_n(wide.const_data_ptr<float>(), outer, out.data());
  std::fill(out.data() + outer, out.data() + padded, 0.0f);
  return out;
}

}  // namespace
}  // namespace aletheia

#pragma GCC pop_options

#endif
