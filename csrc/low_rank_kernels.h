// The inner loops of the low-rank half of a LoRA group and of attention, of which every instruction set has its own
// (low_rank_vec.h, softmax_vec.h).
//
//   rows     C[m, :] = or += a[m, :] B        B packed in panels of `lanes` columns
//   columns  C[r, :] += Σ_t c[t, r] z[t, :]   z a block of rows, packed in panels of 2 `lanes` columns
//   softmax  P = softmax(scale s), dS = P ⊙ (dP - Σ P dP)   over keys, kQueries queries side by side
//
// Sums and packed operands are float32; T, what x, dy, y and dx are made of, is float or bfloat16. Plain pointers and
// numbers alone: wide code must not instantiate inline functions, a copy of which the linker could hand to everybody.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace aletheia::low_rank {

constexpr int64_t kTokens = 48;  // rows in a block: a multiple of every row kernel's height
constexpr int64_t kQueries = 32;  // queries side by side in a strip of scores [keys, kQueries]

// Element (m, k) is data[k / width * panel + m * row + k % width], width being 2 lanes: with panel = width, plain rows.
struct Rows {
  const float* data;
  int64_t row, panel;
};

// B [inner, outer]: element (k, n) is data[(n / lanes * inner + k) * lanes + n % lanes], zero beyond outer.
struct Packed {
  const float* data;
  int64_t inner, outer;
};

// Element e of the whole tensor is kept where its word of the Philox stream reaches the threshold.
struct Mask {
  uint64_t seed;
  uint32_t threshold;
  float scale;    // of what is kept
  int64_t first;  // the element that a block begins with; its rows follow one another
};

template <typename T>
struct Kernels {
  // Rows of `in`, masked if there is a mask, as panels [columns / width][kTokens][width], zero beyond columns.
  void (*load)(const T* in, int64_t ld, int64_t rows, int64_t columns, const Mask* mask, float* panels);
  void (*rows)(Rows a, int64_t rows, Packed b, float* c, int64_t ldc);     // =
  void (*add_rows)(Rows a, int64_t rows, Packed b, T* c, int64_t ldc);     // +=
  // sums [columns / width][ranks][width] += cᵀ z for z as load leaves it.
  void (*columns)(
      const float* c, int64_t ldc, int64_t ranks, int64_t tokens, const float* z, int64_t columns, float* sums);
  void (*columns_of_rows)(  // the same for z that no kernel has loaded, without a mask
      const float* c, int64_t ldc, int64_t ranks, int64_t tokens, const T* z, int64_t ld, int64_t columns, float* sums);
  void (*add_masked)(const float* in, int64_t count, const Mask& mask, T* out);  // out += mask ⊙ in
  void (*narrow)(const float* in, int64_t count, T* out);
};

struct KernelSet {
  int64_t lanes;  // floats in a register
  // Scores of the keys from `position` on become their softmax, in base 2, over those from each query's first to before
  // its last: zero elsewhere, and for a query without keys. tops are the largest of scale times scores, -inf where there
  // is none, totals the sums of 2^(scale s - top).
  void (*softmax)(
      float* scores, int64_t keys, int64_t position, const int32_t* first, const int32_t* last, float scale, float* tops,
      float* totals);
  void (*softmax_backward)(const float* weights, float* dweights, int64_t keys);  // in place of dweights
  Kernels<float> of_float;
  Kernels<c10::BFloat16> of_bfloat16;
};

extern const KernelSet kDefaultKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace aletheia::low_rank
