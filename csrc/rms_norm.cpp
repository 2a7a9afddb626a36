// RMS norm, forward and backward (mathematics: aletheia_kernels/reference/rms_norm.py): a row stays in first-level cache
// between the sum over it and the pass that uses the sum, so every operand crosses memory once.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "convert.h"
#include "operators.h"

namespace aletheia {
namespace {

// Independent partial sums of a row: enough to hide the latency of an addition in any instruction set.
constexpr int64_t kLanes = 32;
// Rows summed before the first of them is used: the processor sums one while it waits for another's root.
constexpr int64_t kRowsAhead = 4;
// Elements that are worth waking another thread for.
constexpr int64_t kGrain = 16384;
// The weight's gradient is summed by chunks of rows whose number depends on the rows alone, then chunk by chunk: the
// same sum on any number of threads.
constexpr int64_t kMaxChunks = 128, kMinChunkRows = 16;

// A template, so that every round has a length the compiler knows: rounds of a loop go through memory.
template <int64_t kCount, typename W>
inline W folded(W* lanes) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    for (int64_t lane = 0; lane < kCount / 2; ++lane) lanes[lane] += lanes[lane + kCount / 2];
    return folded<kCount / 2>(lanes);
  }
}

template <typename T, bool kRoundsFirst>
ALETHEIA_CLONES void forward_rows(
    const T* __restrict x, const Wide<T>* __restrict factor, T* __restrict y, Wide<T>* __restrict rstd, int64_t rows,
    int64_t features, Wide<T> eps) {
  using W = Wide<T>;
  const int64_t whole = features / kLanes * kLanes;
  for (int64_t start = 0; start < rows; start += kRowsAhead) {
    const int64_t end = std::min(start + kRowsAhead, rows);
    for (int64_t row = start; row < end; ++row) {
      const T* values = x + row * features;
      W lanes[kLanes] = {};
      for (int64_t i = 0; i < whole; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const W value = to_wide(values[i + lane]);
          lanes[lane] += value * value;
        }
      for (int64_t i = whole; i < features; ++i) lanes[i - whole] += to_wide(values[i]) * to_wide(values[i]);
      rstd[row] = W{1} / std::sqrt(folded<kLanes>(lanes) / static_cast<W>(features) + eps);
    }
    for (int64_t row = start; row < end; ++row) {
      const T* values = x + row * features;
      T* __restrict out = y + row * features;
      const W r = rstd[row];
      for (int64_t i = 0; i < features; ++i) {
        W normalised = to_wide(values[i]) * r;
        if constexpr (kRoundsFirst) normalised = to_wide(from_wide<T>(normalised));
        out[i] = from_wide<T>(normalised * factor[i]);
      }
    }
  }
}

// dx if asked, and dweight [features] += Σ over the rows of dy ⊙ x r if asked.
template <typename T, bool kInput, bool kWeight>
ALETHEIA_CLONES void backward_rows(
    const T* __restrict dy, const T* __restrict x, const Wide<T>* __restrict factor, const Wide<T>* __restrict rstd,
    T* __restrict dx, Wide<T>* __restrict dweight, int64_t rows, int64_t features) {
  using W = Wide<T>;
  const int64_t whole = features / kLanes * kLanes;
  for (int64_t start = 0; start < rows; start += kRowsAhead) {
    const int64_t end = std::min(start + kRowsAhead, rows);
    W along[kRowsAhead];
    if constexpr (kInput)
      for (int64_t row = start; row < end; ++row) {
        const T *given = dy + row * features, *values = x + row * features;
        W lanes[kLanes] = {};
        for (int64_t i = 0; i < whole; i += kLanes)
          for (int64_t lane = 0; lane < kLanes; ++lane)
            lanes[lane] += to_wide(given[i + lane]) * factor[i + lane] * to_wide(values[i + lane]);
        for (int64_t i = whole; i < features; ++i)
          lanes[i - whole] += to_wide(given[i]) * factor[i] * to_wide(values[i]);
        along[row - start] = folded<kLanes>(lanes) * rstd[row] * rstd[row] / static_cast<W>(features);
      }
    for (int64_t row = start; row < end; ++row) {
      const T *given = dy + row * features, *values = x + row * features;
      const W r = rstd[row];
      if constexpr (kInput) {
        T* __restrict out = dx + row * features;
        const W share = along[row - start];
        for (int64_t i = 0; i < features; ++i)
          out[i] = from_wide<T>(r * (to_wide(given[i]) * factor[i] - to_wide(values[i]) * share));
      }
      if constexpr (kWeight)
        for (int64_t i = 0; i < features; ++i) dweight[i] += to_wide(given[i]) * to_wide(values[i]) * r;
    }
  }
}

at::Tensor factor_of(const at::Tensor& weight, double offset) {
  return weight.contiguous().to(wide(weight.scalar_type())) + offset;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm_forward(
    const at::Tensor& x, const at::Tensor& weight, double eps, double offset, bool rounds_first) {
  const at::Tensor source = x.contiguous(), factor = factor_of(weight, offset);
  const int64_t features = weight.size(0), rows = features == 0 ? 0 : source.numel() / features;
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), factor.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "aletheia_rms_norm", [&] {
    using W = Wide<scalar_t>;
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    const W* scale = factor.const_data_ptr<W>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    W* reciprocal = rstd.mutable_data_ptr<W>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, features)), [&](int64_t a, int64_t b) {
      (rounds_first ? forward_rows<scalar_t, true> : forward_rows<scalar_t, false>)(
          from + a * features, scale, to + a * features, reciprocal + a, b - a, features, static_cast<W>(eps));
    });
  });
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd, double offset,
    bool needs_dx, bool needs_dweight) {
  const at::Tensor above = dy.contiguous(), source = x.contiguous(), reciprocals = rstd.contiguous();
  const at::Tensor factor = factor_of(weight, offset);
  const int64_t features = weight.size(0), rows = features == 0 ? 0 : source.numel() / features;
  const int64_t chunk = std::max(kMinChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  at::Tensor dx = needs_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  at::Tensor partial = needs_dweight ? at::zeros({chunks, features}, factor.options()) : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "aletheia_rms_norm_backward", [&] {
    using W = Wide<scalar_t>;
    const scalar_t *from = source.const_data_ptr<scalar_t>(), *given = above.const_data_ptr<scalar_t>();
    const W *scale = factor.const_data_ptr<W>(), *reciprocal = reciprocals.const_data_ptr<W>();
    scalar_t* to = needs_dx ? dx.mutable_data_ptr<scalar_t>() : nullptr;
    W* sums = needs_dweight ? partial.mutable_data_ptr<W>() : nullptr;
    const auto serve = !needs_dx       ? backward_rows<scalar_t, false, true>
                       : needs_dweight ? backward_rows<scalar_t, true, true>
                                       : backward_rows<scalar_t, true, false>;
    if (!needs_dx && !needs_dweight) return;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, features * chunk));
    at::parallel_for(0, chunks, grain, [&](int64_t a, int64_t b) {
      for (int64_t c = a; c < b; ++c) {
        const int64_t first = c * chunk, start = first * features;
        serve(
            given + start, from + start, scale, reciprocal + first, needs_dx ? to + start : nullptr,
            needs_dweight ? sums + c * features : nullptr, std::min(chunk, rows - first), features);
      }
    });
  });
  return {dx, needs_dweight ? partial.sum(0).to(weight.scalar_type()) : at::empty({0}, weight.options())};
}

}  // namespace aletheia
