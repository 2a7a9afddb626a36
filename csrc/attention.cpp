// Attention over a contiguous range of keys a query, forward and backward, in float32 products on any processor
// (mathematics: aletheia_kernels/reference/attention.py); in bfloat16 on one with AVX512-BF16 attention_bf16.h's.
//
// One task is one segment's one key head with all the query heads that read it: keys and values are made floats in panels
// once for all of them, and dK, dV are summed by one thread alone. A strip holds the scores K qᵀ of kQueries queries with
// the keys that any of them sees, so there is no running maximum and nothing outside is computed; the rows of Pᵀ and dSᵀ
// are the left factors of dV and dK, their columns those of o and dq. The products are low_rank_kernels.h's.
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "attention_bf16.h"
#include "convert.h"
#include "heads.h"
#include "key_ranges.h"
#include "low_rank.h"
#include "operators.h"
#include "tasks.h"

namespace aletheia {
namespace {

using low_rank::KernelSet;
using low_rank::kQueries;
using low_rank::kTokens;
using low_rank::Rows;

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// What a strip of queries see: each of them the keys [first, last) of its segment, any of them some of [start, end).
struct Strip {
  int32_t first[kQueries] = {}, last[kQueries] = {};
  int64_t count, start = 0, end = 0;

  Strip(const Segments& segments, const Segment& segment, int64_t queries, int64_t query)
      : count(std::min(kQueries, segment.query + segment.queries - query)) {
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t m = 0; m < count; ++m) {
      first[m] = segments.firsts[segment.row * queries + query + m];
      last[m] = segments.lasts[segment.row * queries + query + m];
      if (first[m] >= last[m]) continue;
      least = std::min<int64_t>(least, first[m]);
      end = std::max<int64_t>(end, last[m]);
    }
    if (end > 0) start = least;
  }
};

// Rows [count, features] as floats in the panels that columns products read, a block of kTokens rows after another. A row
// on its way serves rows products as well.
template <typename T>
class Blocks {
 public:
  Blocks(const KernelSet& set, int64_t most, int64_t features)
      : set_(set), features_(features), width_(2 * set.lanes), block_(rounded_up(features, width_) * kTokens),
        data_(rounded_up(most, kTokens) / kTokens * block_) {}

  void load(const T* z, int64_t ld, int64_t count) {
    for (int64_t row = 0; row < count; row += kTokens)
      low_rank::kernels_of<T>(set_).load(
          z + row * ld, ld, std::min(kTokens, count - row), features_, nullptr, data_.data() + row / kTokens * block_);
  }
  const float* row(int64_t index) const {
    return data_.data() + index / kTokens * block_ + index % kTokens * width_;
  }
  Rows rows(int64_t index) const { return {row(index), width_, kTokens * width_}; }

  // body(row, count) for rows [begin, end), as many at a time as lie in one block.
  template <typename Body>
  static void each(int64_t begin, int64_t end, Body body) {
    for (int64_t row = begin, count; row < end; row += count) {
      count = std::min(kTokens - row % kTokens, end - row);
      body(row, count);
    }
  }

 private:
  const KernelSet& set_;
  int64_t features_, width_, block_;
  Scratch<float> data_;
};

// What a thread needs of one head's strips.
template <typename T>
class Strips {
 public:
  Strips(const KernelSet& set, int64_t most, int64_t features)
      : set_(set), most_(most), features_(features), width_(2 * set.lanes),
        packed_(kQueries * rounded_up(features, set.lanes)),
        sums_(rounded_up(features, width_) * kQueries) {}

  Scratch<float> scores() const { return Scratch<float>(most_ * kQueries); }

  // Of the strip's keys with its queries z: s [keys, kQueries] = keys zᵀ.
  void scores_of(const Strip& strip, const Blocks<T>& keys, const T* z, int64_t ld, float* s) const {
    for (int64_t first = 0; first < kQueries; first += set_.lanes)
      for (int64_t feature = 0; feature < features_; ++feature)
        for (int64_t lane = 0; lane < set_.lanes; ++lane) {
          const int64_t query = first + lane;
          packed_[first * features_ + feature * set_.lanes + lane] =
              query < strip.count ? to_wide(z[query * ld + feature]) : 0.0f;
        }
    Blocks<T>::each(strip.start, strip.end, [&](int64_t key, int64_t count) {
      set_.of_float.rows(
          keys.rows(key), count, {packed_.data(), features_, kQueries}, s + (key - strip.start) * kQueries, kQueries);
    });
  }

  // out [queries, features] = factor wᵀ z for weights w [keys, kQueries] and rows z of the keys.
  void gather(const Strip& strip, const float* w, const Blocks<T>& z, float factor, T* out, int64_t ld) const {
    const int64_t padded = rounded_up(features_, width_);
    std::fill_n(sums_.data(), padded * strip.count, 0.0f);
    Blocks<T>::each(strip.start, strip.end, [&](int64_t key, int64_t count) {
      set_.of_float.columns(
          w + (key - strip.start) * kQueries, kQueries, strip.count, count, z.row(key), features_, sums_.data());
    });
    if (factor != 1.0f)
      for (int64_t e = 0; e < padded * strip.count; ++e) sums_[e] *= factor;
    for (int64_t feature = 0; feature < features_; feature += width_)
      for (int64_t m = 0; m < strip.count; ++m)
        low_rank::kernels_of<T>(set_).narrow(
            sums_.data() + feature * strip.count + m * width_, std::min(width_, features_ - feature),
            out + m * ld + feature);
  }

  // sums [segment's keys, features] += w z for weights w [keys, kQueries] and rows z of the queries.
  void scatter(const Strip& strip, const float* w, const T* z, int64_t ld, float* sums) const {
    float* packed = packed_.data();
    for (int64_t first = 0; first < features_; first += set_.lanes)
      for (int64_t m = 0; m < strip.count; ++m)
        for (int64_t lane = 0; lane < set_.lanes; ++lane) {
          const int64_t feature = first + lane;
          *packed++ = feature < features_ ? to_wide(z[m * ld + feature]) : 0.0f;
        }
    set_.of_float.add_rows(
        {w, kQueries, width_}, strip.end - strip.start, {packed_.data(), strip.count, features_},
        sums + strip.start * features_, features_);
  }

 private:
  const KernelSet& set_;
  int64_t most_, features_, width_;
  Scratch<float> packed_, sums_;
};

template <typename T>
std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any, const at::Tensor& first,
    const at::Tensor& last, double scale) {
  const at::Tensor q_t = with_unit_features(q_any), k_t = with_unit_features(k_any), v_t = with_unit_features(v_any);
  const int64_t batch = q_t.size(0), heads = q_t.size(1), queries = q_t.size(2), features = q_t.size(3);
  const int64_t groups = k_t.size(1), per_group = heads / groups;
  at::Tensor o_t = at::empty({batch, queries, heads, features}, q_t.options()).transpose(1, 2);
  at::Tensor lse_t = at::empty({batch, heads, queries}, q_t.options().dtype(at::kFloat));
  const Heads<T> q(q_t), k(k_t), v(v_t);
  T* const o = o_t.mutable_data_ptr<T>();
  float* const lse = lse_t.mutable_data_ptr<float>();
  const Segments segments(first, last, k_t.size(2));
  const int64_t tasks = static_cast<int64_t>(segments.all.size()) * groups;
  const KernelSet& set = low_rank::kernel_set();

  on_threads(tasks, [&](auto take) {
    Blocks<T> keys(set, segments.most_keys, features), values(set, segments.most_keys, features);
    const Strips<T> strips(set, segments.most_keys, features);
    const Scratch<float> scores = strips.scores();
    float tops[kQueries], totals[kQueries];
    for (int64_t task; (task = take()) < tasks;) {
      const Segment& segment = segments.all[task / groups];
      const int64_t b = segment.row, group = task % groups;
      keys.load(k.at(b, group, segment.key), k.row, segment.keys);
      values.load(v.at(b, group, segment.key), v.row, segment.keys);
      for (int64_t query = segment.query; query < segment.query + segment.queries; query += kQueries) {
        const Strip strip(segments, segment, queries, query);
        for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h) {
          strips.scores_of(strip, keys, q.at(b, h, query), q.row, scores.data());
          set.softmax(
              scores.data(), strip.end - strip.start, strip.start, strip.first, strip.last,
              static_cast<float>(scale * kLog2e), tops, totals);
          strips.gather(
              strip, scores.data(), values, 1.0f, o + ((b * queries + query) * heads + h) * features, heads * features);
          for (int64_t m = 0; m < strip.count; ++m)
            lse[(b * heads + h) * queries + query + m] = static_cast<float>(tops[m] * kLn2 + std::log(totals[m]));
        }
      }
    }
  });
  return {o_t, lse_t};
}

// P is made again from the scores and their maximum: from lse, rounded, large scores would lose their last digits.
template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& do_any, const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
    const at::Tensor& first, const at::Tensor& last, double scale) {
  const at::Tensor q_t = with_unit_features(q_any), k_t = with_unit_features(k_any), v_t = with_unit_features(v_any);
  const at::Tensor do_t = with_unit_features(do_any);
  const int64_t heads = q_t.size(1), queries = q_t.size(2), features = q_t.size(3);
  const int64_t keys_a_row = k_t.size(2), groups = k_t.size(1), per_group = heads / groups;
  at::Tensor dq_t = at::empty(q_t.sizes(), q_t.options());
  at::Tensor dk_t = at::empty(k_t.sizes(), q_t.options()), dv_t = at::empty(k_t.sizes(), q_t.options());
  const Heads<T> q(q_t), k(k_t), v(v_t), dO(do_t);
  T* const dq = dq_t.mutable_data_ptr<T>();
  T* const dk = dk_t.mutable_data_ptr<T>();
  T* const dv = dv_t.mutable_data_ptr<T>();
  const Segments segments(first, last, keys_a_row);
  const int64_t tasks = static_cast<int64_t>(segments.all.size()) * groups;
  const KernelSet& set = low_rank::kernel_set();

  on_threads(tasks, [&](auto take) {
    const int64_t most = segments.most_keys;
    Blocks<T> keys(set, most, features), values(set, most, features);
    const Strips<T> strips(set, most, features);
    const Scratch<float> weights = strips.scores(), dscores = strips.scores();
    const Scratch<float> dk_sums(most * features), dv_sums(most * features);
    float tops[kQueries], totals[kQueries];
    for (int64_t task; (task = take()) < tasks;) {
      const Segment& segment = segments.all[task / groups];
      const int64_t b = segment.row, group = task % groups, elements = segment.keys * features;
      keys.load(k.at(b, group, segment.key), k.row, segment.keys);
      values.load(v.at(b, group, segment.key), v.row, segment.keys);
      std::fill_n(dk_sums.data(), elements, 0.0f);
      std::fill_n(dv_sums.data(), elements, 0.0f);
      for (int64_t query = segment.query; query < segment.query + segment.queries; query += kQueries) {
        const Strip strip(segments, segment, queries, query);
        for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h) {
          strips.scores_of(strip, keys, q.at(b, h, query), q.row, weights.data());
          set.softmax(
              weights.data(), strip.end - strip.start, strip.start, strip.first, strip.last,
              static_cast<float>(scale * kLog2e), tops, totals);
          strips.scores_of(strip, values, dO.at(b, h, query), dO.row, dscores.data());
          set.softmax_backward(weights.data(), dscores.data(), strip.end - strip.start);
          strips.gather(
              strip, dscores.data(), keys, static_cast<float>(scale), dq + ((b * heads + h) * queries + query) * features,
              features);
          strips.scatter(strip, weights.data(), dO.at(b, h, query), dO.row, dv_sums.data());
          strips.scatter(strip, dscores.data(), q.at(b, h, query), q.row, dk_sums.data());
        }
      }
      for (int64_t e = 0; e < elements; ++e) dk_sums[e] *= static_cast<float>(scale);
      const int64_t offset = ((b * groups + group) * keys_a_row + segment.key) * features;
      low_rank::kernels_of<T>(set).narrow(dk_sums.data(), elements, dk + offset);
      low_rank::kernels_of<T>(set).narrow(dv_sums.data(), elements, dv + offset);
    }
  });
  return {dq_t, dk_t, dv_t};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& first, const at::Tensor& last,
    double scale) {
  if (attention_bf16::serves(q.scalar_type())) return attention_bf16::forward(q, k, v, first, last, scale);
  return (q.scalar_type() == at::kFloat ? forward<float> : forward<at::BFloat16>)(q, k, v, first, last, scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& dO, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lse,
    const at::Tensor& first, const at::Tensor& last, double scale) {
  if (attention_bf16::serves(q.scalar_type())) return attention_bf16::backward(dO, q, k, v, lse, first, last, scale);
  return (q.scalar_type() == at::kFloat ? backward<float> : backward<at::BFloat16>)(dO, q, k, v, first, last, scale);
}

}  // namespace aletheia
