// Attention over a contiguous range of keys a query, forward and backward, in bfloat16
// (mathematics: aletheia_kernels/reference/attention.py).
//
// One task is one sequence's one key head with all the query heads that read it: keys and values are packed once for
// them and dK, dV are summed by one thread alone. Queries go in blocks; a block's scores lie in second-level cache as
// one strip of the keys that any of its queries sees, so there is no running maximum and nothing outside is computed.
#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

#include "bf16_products.h"
#include "operators.h"

#ifdef ALETHEIA_AVX512BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia {
namespace {

constexpr int64_t kQueries = 48;  // queries in a block: eight strips of six rows

// Rows z [count, features] as B [features, count]: dot products with rows.
std::vector<uint16_t> pack_transposed(const bf16* z, int64_t ld, int64_t count, int64_t features) {
  const int64_t pairs = (features + 1) / 2, panels = (count + kLanes - 1) / kLanes;
  std::vector<uint16_t> out(panels * pairs * 2 * kLanes, 0);
  for (int64_t n = 0; n < count; ++n) {
    uint16_t* column = out.data() + (n / kLanes) * pairs * 2 * kLanes + (n % kLanes) * 2;
    for (int64_t pair = 0; pair < pairs; ++pair)
      std::memcpy(column + pair * 2 * kLanes, z + n * ld + 2 * pair, 2 * pair + 1 < features ? 4 : 2);
  }
  return out;
}

// Rows z [count, features] as B [count, features]: sums of rows.
std::vector<uint16_t> pack_rows(const bf16* z, int64_t ld, int64_t count, int64_t features) {
  const int64_t pairs = (count + 1) / 2, panels = (features + kLanes - 1) / kLanes;
  std::vector<uint16_t> out(panels * pairs * 2 * kLanes, 0);
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const __mmask16 mask = first_lanes(features - panel * kLanes);
      const bf16* row = z + 2 * pair * ld + panel * kLanes;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
      const __m512i odd = 2 * pair + 1 < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + ld))
                                               : _mm512_setzero_si512();
      _mm512_storeu_si512(
          out.data() + (panel * pairs + pair) * 2 * kLanes, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  return out;
}

// Strided [batch, heads, tokens, features] bfloat16 with unit last stride.
struct Heads {
  const bf16* data;
  int64_t batch, head, row;
  explicit Heads(const at::Tensor& t)
      : data(t.const_data_ptr<bf16>()), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)) {}
  const bf16* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * row; }
};

at::Tensor with_unit_features(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

// The keys that a block of queries sees: per query [first, last), all of them within [start, start + count), with start
// on a panel's edge.
struct Span {
  const int32_t* first;
  const int32_t* last;
  int64_t queries, start = std::numeric_limits<int64_t>::max(), count = 0;

  Span(const int32_t* first, const int32_t* last, int64_t queries) : first(first), last(last), queries(queries) {
    int64_t end = 0;
    for (int64_t m = 0; m < queries; ++m)
      if (last[m] > first[m]) {
        start = std::min<int64_t>(start, first[m]);
        end = std::max<int64_t>(end, last[m]);
      }
    if (end == 0) {
      start = 0;
    } else {
      start = start / kLanes * kLanes;
      count = end - start;
    }
  }
  int64_t padded() const { return (count + kLanes - 1) / kLanes * kLanes; }
  // Which of the 16 keys from `column` on, counted from start, query m sees.
  __mmask16 seen(int64_t m, int64_t column) const {
    const int64_t from = std::clamp<int64_t>(first[m] - start - column, 0, kLanes);
    const int64_t to = std::clamp<int64_t>(last[m] - start - column, 0, kLanes);
    return to > from ? static_cast<__mmask16>(first_lanes(to) & ~first_lanes(from)) : __mmask16(0);
  }
};

Panels keys_as_columns(const std::vector<uint16_t>& packed, const Span& span, int64_t features) {
  const int64_t stride = (features + 1) / 2 * 2 * kLanes;
  return {packed.data() + span.start / kLanes * stride, stride, features, span.count};
}

Panels keys_as_rows(const std::vector<uint16_t>& packed, const Span& span, int64_t keys, int64_t features) {
  return {packed.data() + span.start * kLanes, (keys + 1) / 2 * 2 * kLanes, span.count, features};
}

// Two queries' values of one key side by side: what a column kernel broadcasts. keys is a multiple of 16.
void pair_queries(std::vector<uint32_t>& out, const uint16_t* values, int64_t ld, int64_t queries, int64_t keys) {
  const int64_t pairs = (queries + 1) / 2;
  out.resize(keys * pairs);
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t key = 0; key < keys; key += kLanes) {
      const auto row = reinterpret_cast<const __m256i*>(values + 2 * pair * ld + key);
      const auto next = reinterpret_cast<const __m256i*>(values + (2 * pair + 1) * ld + key);
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(row));
      const __m512i odd = 2 * pair + 1 < queries ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(next))
                                                 : _mm512_setzero_si512();
      _mm512_storeu_si512(out.data() + pair * keys + key, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

template <typename Body>
void over_tasks(const at::Tensor& q, const at::Tensor& k, Body body) {
  const int64_t groups = k.size(1);
  at::parallel_for(0, q.size(0) * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task / groups, task % groups);
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any, const at::Tensor& first,
    const at::Tensor& last, double scale) {
  const at::Tensor q_t = with_unit_features(q_any), k_t = with_unit_features(k_any), v_t = with_unit_features(v_any);
  const int64_t batch = q_t.size(0), heads = q_t.size(1), queries = q_t.size(2), features = q_t.size(3);
  const int64_t keys = k_t.size(2), per_group = heads / k_t.size(1);
  at::Tensor o_t = at::empty({batch, queries, heads, features}, q_t.options()).transpose(1, 2);
  at::Tensor lse_t = at::empty({batch, heads, queries}, q_t.options().dtype(at::kFloat));
  const Heads q(q_t), k(k_t), v(v_t);
  bf16* o = o_t.mutable_data_ptr<bf16>();
  float* lse = lse_t.mutable_data_ptr<float>();
  const int32_t* first_data = first.const_data_ptr<int32_t>();
  const int32_t* last_data = last.const_data_ptr<int32_t>();
  const __m512 scale_lanes = _mm512_set1_ps(static_cast<float>(scale));

  over_tasks(q_t, k_t, [&](int64_t b, int64_t group) {
    const auto k_columns = pack_transposed(k.at(b, group, 0), k.row, keys, features);
    const auto v_rows = pack_rows(v.at(b, group, 0), v.row, keys, features);
    std::vector<float> scores, sums(kQueries * features);
    std::vector<uint16_t> weights;
    for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h)
      for (int64_t start = 0; start < queries; start += kQueries) {
        const int64_t count = std::min(kQueries, queries - start), row = b * queries + start;
        const Span span(first_data + row, last_data + row, count);
        const int64_t width = span.padded();
        scores.resize(kQueries * width);
        weights.resize(kQueries * width);
        rows_product<Into::kFloat>(
            q.at(b, h, start), q.row, count, keys_as_columns(k_columns, span, features), scores.data(), width);
        float totals[kQueries];
        for (int64_t m = 0; m < count; ++m) {
          float* s = scores.data() + m * width;
          __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
          for (int64_t column = 0; column < width; column += kLanes)
            top = _mm512_mask_max_ps(top, span.seen(m, column), top, _mm512_loadu_ps(s + column));
          const float maximum = _mm512_reduce_max_ps(_mm512_mul_ps(top, scale_lanes));
          const __m512 shift = _mm512_set1_ps(maximum);
          __m512 total = _mm512_setzero_ps();
          for (int64_t column = 0; column < width; column += kLanes) {
            const __m512 z = _mm512_fmsub_ps(_mm512_loadu_ps(s + column), scale_lanes, shift);
            const __m512 p = _mm512_maskz_mov_ps(span.seen(m, column), exponential(z));
            total = _mm512_add_ps(total, p);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights.data() + m * width + column), narrow(p));
          }
          totals[m] = _mm512_reduce_add_ps(total);
          lse[(b * heads + h) * queries + start + m] = maximum + std::log(totals[m]);
        }
        rows_product<Into::kFloat>(
            reinterpret_cast<const bf16*>(weights.data()), width, count,
            keys_as_rows(v_rows, span, keys, features), sums.data(), features);
        for (int64_t m = 0; m < count; ++m) {
          const float inverse = totals[m] > 0.0f ? 1.0f / totals[m] : 0.0f;
          bf16* target = o + ((row + m) * heads + h) * features;
          for (int64_t f = 0; f < features; ++f) target[f] = static_cast<bf16>(sums[m * features + f] * inverse);
        }
      }
  });
  return {o_t, lse_t};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& do_any, const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
    const at::Tensor& lse_t, const at::Tensor& first, const at::Tensor& last, double scale) {
  const at::Tensor q_t = with_unit_features(q_any), k_t = with_unit_features(k_any), v_t = with_unit_features(v_any);
  const at::Tensor do_t = with_unit_features(do_any);
  const int64_t heads = q_t.size(1), queries = q_t.size(2), features = q_t.size(3);
  const int64_t keys = k_t.size(2), groups = k_t.size(1), per_group = heads / groups;
  at::Tensor dq_t = at::empty(q_t.sizes(), q_t.options());
  at::Tensor dk_t = at::empty(k_t.sizes(), q_t.options()), dv_t = at::empty(k_t.sizes(), q_t.options());
  const Heads q(q_t), k(k_t), v(v_t), dO(do_t);
  bf16* dq = dq_t.mutable_data_ptr<bf16>();
  bf16* dk = dk_t.mutable_data_ptr<bf16>();
  bf16* dv = dv_t.mutable_data_ptr<bf16>();
  const float* lse = lse_t.const_data_ptr<float>();
  const int32_t* first_data = first.const_data_ptr<int32_t>();
  const int32_t* last_data = last.const_data_ptr<int32_t>();
  const __m512 scale_lanes = _mm512_set1_ps(static_cast<float>(scale));

  over_tasks(q_t, k_t, [&](int64_t b, int64_t group) {
    const auto k_columns = pack_transposed(k.at(b, group, 0), k.row, keys, features);
    const auto v_columns = pack_transposed(v.at(b, group, 0), v.row, keys, features);
    const auto k_rows = pack_rows(k.at(b, group, 0), k.row, keys, features);
    const int64_t padded = (keys + kLanes - 1) / kLanes * kLanes;
    std::vector<float> dk_sums(padded * features, 0.0f), dv_sums(padded * features, 0.0f);
    std::vector<float> scores, dweights, sums(kQueries * features);
    std::vector<uint16_t> weights, dscores;
    std::vector<uint32_t> coefficients;
    Interleaved block;
    for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h)
      for (int64_t start = 0; start < queries; start += kQueries) {
        const int64_t count = std::min(kQueries, queries - start), row = b * queries + start;
        const Span span(first_data + row, last_data + row, count);
        const int64_t width = span.padded();
        scores.resize(kQueries * width);
        dweights.resize(kQueries * width);
        weights.resize(kQueries * width);
        dscores.resize(kQueries * width);
        const bf16* q_block = q.at(b, h, start);
        const bf16* do_block = dO.at(b, h, start);
        rows_product<Into::kFloat>(
            q_block, q.row, count, keys_as_columns(k_columns, span, features), scores.data(), width);
        rows_product<Into::kFloat>(
            do_block, dO.row, count, keys_as_columns(v_columns, span, features), dweights.data(), width);
        for (int64_t m = 0; m < count; ++m) {
          float* p_row = scores.data() + m * width;
          const float* dp_row = dweights.data() + m * width;
          const __m512 shift = _mm512_set1_ps(lse[(b * heads + h) * queries + start + m]);
          // D = Σ_j P_j dP_j from the very numbers it is taken off: where a query sees few keys they cancel exactly,
          // which do · o, rounded with o, would not.
          __m512 sum = _mm512_setzero_ps();
          for (int64_t column = 0; column < width; column += kLanes) {
            const __mmask16 seen = span.seen(m, column);
            const __m512 z = _mm512_fmsub_ps(_mm512_loadu_ps(p_row + column), scale_lanes, shift);
            const __m512 p = _mm512_maskz_mov_ps(seen, exponential(z));
            sum = _mm512_add_ps(sum, _mm512_maskz_mul_ps(seen, p, _mm512_loadu_ps(dp_row + column)));
            _mm512_storeu_ps(p_row + column, p);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights.data() + m * width + column), narrow(p));
          }
          const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
          for (int64_t column = 0; column < width; column += kLanes) {
            const __m512 p = _mm512_mul_ps(_mm512_loadu_ps(p_row + column), scale_lanes);
            const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(dp_row + column), mean);
            const __m512 ds = _mm512_maskz_mul_ps(span.seen(m, column), p, centred);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(dscores.data() + m * width + column), narrow(ds));
          }
        }
        rows_product<Into::kFloat>(
            reinterpret_cast<const bf16*>(dscores.data()), width, count, keys_as_rows(k_rows, span, keys, features),
            sums.data(), features);
        bf16* dq_block = dq + ((b * heads + h) * queries + start) * features;
        for (int64_t e = 0; e < count * features; ++e) dq_block[e] = static_cast<bf16>(sums[e]);

        pair_queries(coefficients, weights.data(), width, count, width);
        block.load(do_block, dO.row, count, features);
        columns_product(coefficients.data(), width, block, features, dv_sums.data() + span.start * features, features, 2 * kLanes);
        pair_queries(coefficients, dscores.data(), width, count, width);
        block.load(q_block, q.row, count, features);
        columns_product(coefficients.data(), width, block, features, dk_sums.data() + span.start * features, features, 2 * kLanes);
      }
    const int64_t offset = (b * groups + group) * keys * features;
    for (int64_t e = 0; e < keys * features; ++e) {
      dk[offset + e] = static_cast<bf16>(dk_sums[e]);
      dv[offset + e] = static_cast<bf16>(dv_sums[e]);
    }
  });
  return {dq_t, dk_t, dv_t};
}

}  // namespace aletheia

#pragma GCC pop_options

#else

namespace aletheia {

std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, double) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}

}  // namespace aletheia

#endif
