// Attention over a contiguous range of keys a query, forward and backward, in bfloat16
// (mathematics: aletheia_kernels/reference/attention.py).
//
// One task is one sequence's one key head with all the query heads that read it: what is packed of keys and values
// serves them all, and dK, dV are summed by one thread alone. Scores are computed as K qᵀ: a group of 32 queries lies
// in the lanes of two registers, so that maxima, sums and ranges are lane by lane, and the rows of Pᵀ and dSᵀ are left
// factors of dV and dK as they are. A group's scores lie in cache as one strip of the keys that any of its queries
// sees, so there is no running maximum and nothing outside is computed.
#include "attention_bf16.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "block_product.h"
#include "heads.h"
#include "key_ranges.h"

#ifdef ALETHEIA_AVX512BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia {
namespace {

constexpr int64_t kGroup = 2 * kLanes;    // queries side by side: two registers of scores, a tile's inner indices
constexpr int64_t kQueries = 4 * kGroup;  // queries whose shares of dK and dV are added at a time
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

constexpr int64_t in_groups(int64_t count) { return (count + kGroup - 1) / kGroup * kGroup; }

// Two ways to C = or += a B, C in float32 with B's panels, an even number of them, as columns. B ends in zeros up to a
// multiple of 32 inner indices; a need not.
struct VectorProducts {
  template <Into kInto>
  void product(const bf16* a, int64_t lda, int64_t rows, const Panels& b, float* c, int64_t ldc) {
    rows_product<kInto>(a, lda, rows, b, c, ldc);
  }
};

class TileProducts {
 public:
  template <Into kInto>
  void product(const bf16* a, int64_t lda, int64_t rows, const Panels& b, float* c, int64_t ldc) {
    const int64_t odd = b.inner % kTileInner, whole = b.inner - odd;
    for (int64_t row = 0, count = 0; row < rows; row += count, a += count * lda) {
      count = std::min(rows - row, 2 * kTileRows);
      registers_.shape(count % kTileRows == 0 ? 2 * kTileRows : count);
      // What is left of a's rows after whole tiles lies between other things.
      alignas(64) uint16_t tail[2 * kTileRows * kTileInner];
      for (int64_t m = 0; odd > 0 && m < count; ++m)
        _mm512_store_si512(
            tail + m * kTileInner, _mm512_maskz_loadu_epi16(first_pairs_of_lanes(odd), a + m * lda + whole));
      for (int64_t panel = 0; panel < b.count(); panel += 2)
        (count > kTileRows ? strip<2, kInto> : strip<1, kInto>)(
            a, lda, whole, odd > 0 ? tail : nullptr, b.panel(panel), b.stride, c + row * ldc + panel * kLanes, ldc);
    }
  }

 private:
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
  template <int kBands, Into kInto>
  static __attribute__((noinline)) void strip(
      const bf16* a, int64_t lda, int64_t inner, const uint16_t* tail, const uint16_t* b, int64_t stride, float* c,
      int64_t ldc) {
    const auto each_sum = [&](auto visit) __attribute__((always_inline)) {
      visit(std::integral_constant<int, 0>{}, c);
      visit(std::integral_constant<int, 1>{}, c + kLanes);
      if constexpr (kBands == 2) visit(std::integral_constant<int, 2>{}, c + kTileRows * ldc);
      if constexpr (kBands == 2) visit(std::integral_constant<int, 3>{}, c + kTileRows * ldc + kLanes);
    };
    const int64_t sum_bytes = ldc * static_cast<int64_t>(sizeof(float));
    each_sum([&](auto tile, float* at) __attribute__((always_inline)) {
      if constexpr (kInto == Into::kAddFloat)
        tile_load<tile>(at, sum_bytes);
      else
        tile_zero<tile>();
    });
    const auto step = [&](const void* left, int64_t row_bytes) __attribute__((always_inline)) {
      tile_load<6>(b, 4 * kLanes);
      tile_load<4>(left, row_bytes);
      tile_multiply_add<0, 4, 6>();
      tile_load<7>(b + stride, 4 * kLanes);
      tile_multiply_add<1, 4, 7>();
      if constexpr (kBands == 2) {
        tile_load<5>(static_cast<const char*>(left) + kTileRows * row_bytes, row_bytes);
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
      }
      b += kTileInner * kLanes;
    };
    for (int64_t k = 0; k < inner; k += kTileInner) step(a + k, lda * static_cast<int64_t>(sizeof(bf16)));
    if (tail != nullptr) step(tail, kTileInner * sizeof(bf16));
    each_sum([&](auto tile, float* at) __attribute__((always_inline)) { tile_store<tile>(at, sum_bytes); });
  }
#pragma GCC pop_options

  TileRegisters registers_;
};

// Two rows with their elements in pairs, zeros for a row that is not there.
inline __m512i paired(const bf16* row, int64_t ld, int64_t rows, int64_t columns) {
  const __mmask16 mask = first_lanes(std::max<int64_t>(columns, 0));
  const auto load = [&](const bf16* from) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)); };
  const __m512i even = rows > 0 ? load(row) : _mm512_setzero_si512();
  return rows > 1 ? _mm512_or_si512(even, _mm512_slli_epi32(load(row + ld), 16)) : even;
}

// Rows z [count, features] as the columns of B [features, count].
void pack_columns(const bf16* z, int64_t ld, int64_t count, int64_t features, uint16_t* out) {
  const int64_t stride = in_groups(features) * kLanes;
  for (int64_t column = 0; column < in_groups(count); column += kLanes, out += stride)
    for (int64_t feature = 0; feature < features; feature += 2 * kLanes) {
      const __mmask32 mask = first_pairs_of_lanes(features - feature);
      __m512i block[kLanes];
      for (int64_t n = 0; n < kLanes; ++n)
        block[n] = column + n < count ? _mm512_maskz_loadu_epi16(mask, z + (column + n) * ld + feature)
                                      : _mm512_setzero_si512();
      transpose(block);
      for (int64_t j = 0; j < kLanes; ++j) _mm512_store_si512(out + feature * kLanes + j * 2 * kLanes, block[j]);
    }
}

// Rows z [count, features] as the rows of B [count, features].
void pack_rows(const bf16* z, int64_t ld, int64_t count, int64_t features, uint16_t* out) {
  for (int64_t feature = 0; feature < in_groups(features); feature += kLanes)
    for (int64_t row = 0; row < in_groups(count); row += 2, out += 2 * kLanes)
      _mm512_store_si512(out, paired(z + row * ld + feature, ld, count - row, features - feature));
}

// Rows z [count, features] as rows of features, [features, count]. Either dimension ends in zeros up to whole groups.
void transpose_rows(const bf16* z, int64_t ld, int64_t count, int64_t features, uint16_t* out, int64_t ldo) {
  for (int64_t row = 0; row < count; row += 2 * kLanes)
    for (int64_t feature = 0; feature < in_groups(features); feature += kLanes) {
      __m512i block[kLanes];
      for (int64_t n = 0; n < kLanes; ++n)
        block[n] = paired(z + (row + 2 * n) * ld + feature, ld, count - row - 2 * n, features - feature);
      transpose(block);
      for (int64_t j = 0; j < kLanes; ++j) _mm512_storeu_si512(out + (feature + j) * ldo + row, block[j]);
    }
}

// Rows of a transposed operand: not a power of two apart, so that a tile's rows do not share their cache sets.
constexpr int64_t transposed_row(int64_t keys) { return in_groups(keys) + kGroup; }

// What up to 32 queries side by side see: each of them the keys [first, last), any of them some of the `count` from
// `start` on.
struct Group {
  __m512i first[2], last[2];
  int64_t start = 0, count = 0;
  int64_t shared = 0, shared_end = 0;  // counted from start: the keys that every query sees

  Group(const int32_t* firsts, const int32_t* lasts, int64_t queries) {
    int64_t least = std::numeric_limits<int64_t>::max(), end = 0, latest = 0, soonest = least;
    for (int half = 0; half < 2; ++half) {
      const __mmask16 real = first_lanes(std::max<int64_t>(queries - half * kLanes, 0));
      first[half] = _mm512_maskz_loadu_epi32(real, firsts + half * kLanes);
      last[half] = _mm512_maskz_loadu_epi32(real, lasts + half * kLanes);
      latest = std::max<int64_t>(latest, _mm512_reduce_max_epi32(first[half]));
      soonest = std::min<int64_t>(soonest, _mm512_reduce_min_epi32(last[half]));
      const __mmask16 some = _mm512_cmplt_epi32_mask(first[half], last[half]);
      least = std::min<int64_t>(least, _mm512_mask_reduce_min_epi32(some, first[half]));
      end = std::max<int64_t>(end, _mm512_mask_reduce_max_epi32(some, last[half]));
    }
    if (end == 0) return;
    start = least;
    count = end - least;
    shared = latest - start;
    shared_end = soonest - start;
  }
  int64_t padded() const { return in_groups(count); }
  int64_t end() const { return start + count; }

  // Which queries of a half see the key.
  __mmask16 seen(int half, int64_t key) const {
    const __m512i position = _mm512_set1_epi32(static_cast<int>(start + key));
    return _mm512_mask_cmpgt_epi32_mask(_mm512_cmple_epi32_mask(first[half], position), last[half], position);
  }
  // body(key, shared) for every second key, counted from start, up to a multiple of 32; shared is std::true_type where
  // every query sees it and the next.
  template <typename Body>
  __attribute__((always_inline)) void over_pairs(Body body) const {
    const int64_t from = std::min((shared + 1) / 2 * 2, padded());
    int64_t key = 0;
    for (; key < from; key += 2) body(key, std::false_type{});
    for (; key + 2 <= shared_end; key += 2) body(key, std::true_type{});
    for (; key < padded(); key += 2) body(key, std::false_type{});
  }
};

// 2^t = 2^⌊t⌋ 2^f, 2^f by the polynomial of degree 4 that is exact at 0 and 1 and else off by at most 3.4e-6 of it: a
// five hundredth of bfloat16's roundoff. Stops at 2^-126: smaller numbers take a hundred times as long.
inline __m512 power_of_two(__m512 t) {
  t = _mm512_max_ps(_mm512_set1_ps(-126.0f), t);
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0135557472f);
  for (const float c : {0.0520323691f, 0.241379763f, 0.693032121f, 1.0f}) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, t);
}

// The two halves of a group's values for one key as bfloat16.
inline __m512i narrow_both(const __m512 (&halves)[2]) { return (__m512i)_mm512_cvtne2ps_pbh(halves[1], halves[0]); }

// Two keys' values of a group as a pair of inner indices of B. Its two panels hold, of every eight queries, the first
// four and the last four.
inline void store_pair(uint16_t* pairs, int64_t stride, int64_t key, __m512i even, __m512i odd) {
  _mm512_store_si512(pairs + key * kLanes, _mm512_unpacklo_epi16(even, odd));
  _mm512_store_si512(pairs + stride + key * kLanes, _mm512_unpackhi_epi16(even, odd));
}

// The product with such a B, [features, 32], as rows of out, each times its factor.
void store_queries(
    const float* sums, const float* factors, int64_t queries, int64_t features, bf16* out, int64_t ldo) {
  for (int64_t feature = 0; feature < features; feature += 2 * kLanes)
    for (int64_t panel = 0; panel < 2; ++panel) {
      __m512i low[kLanes], high[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        low[j] = _mm512_load_si512(sums + (feature + j) * kGroup + panel * kLanes);
        high[j] = _mm512_load_si512(sums + (feature + kLanes + j) * kGroup + panel * kLanes);
      }
      transpose(low);
      transpose(high);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t query = lane / 4 * 8 + panel * 4 + lane % 4;
        if (query >= queries) continue;
        const __m512 factor = _mm512_set1_ps(factors[query]);
        const __m512 left = _mm512_mul_ps(_mm512_castsi512_ps(low[lane]), factor);
        const __m512i both = narrow_both({left, _mm512_mul_ps(_mm512_castsi512_ps(high[lane]), factor)});
        _mm512_mask_storeu_epi16(out + query * ldo + feature, first_pairs_of_lanes(features - feature), both);
      }
    }
}

// Sums [rows, features] times a factor, whose rows end in padding, as bfloat16.
void store_rows(const float* sums, float factor, int64_t rows, int64_t features, bf16* out) {
  const __m512 times = _mm512_set1_ps(factor);
  for (int64_t row = 0; row < rows; ++row, sums += in_groups(features), out += features)
    for (int64_t f = 0; f < features; f += 2 * kLanes) {
      const __m512i both = narrow_both(
          {_mm512_mul_ps(_mm512_load_ps(sums + f), times), _mm512_mul_ps(_mm512_load_ps(sums + f + kLanes), times)});
      _mm512_mask_storeu_epi16(out + f, first_pairs_of_lanes(features - f), both);
    }
}

template <typename Products>
std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any, const at::Tensor& first,
    const at::Tensor& last, double scale) {
  const at::Tensor q_t = with_unit_features(q_any), k_t = with_unit_features(k_any), v_t = with_unit_features(v_any);
  const int64_t batch = q_t.size(0), heads = q_t.size(1), queries = q_t.size(2), features = q_t.size(3);
  const int64_t keys = k_t.size(2), groups = k_t.size(1), per_group = heads / groups;
  at::Tensor o_t = at::empty({batch, queries, heads, features}, q_t.options()).transpose(1, 2);
  at::Tensor lse_t = at::empty({batch, heads, queries}, q_t.options().dtype(at::kFloat));
  const Heads<bf16> q(q_t), k(k_t), v(v_t);
  bf16* o = o_t.mutable_data_ptr<bf16>();
  float* lse = lse_t.mutable_data_ptr<float>();
  const Segments segments(first, last, keys);
  const __m512 scale_lanes = _mm512_set1_ps(static_cast<float>(scale) * kLog2e);
  const int64_t width = in_groups(features), most = segments.most_keys;
  const int64_t tasks = static_cast<int64_t>(segments.all.size()) * groups;

  on_threads(tasks, [&](auto take) {
    Products products;
    const Scratch<uint16_t> values(width * transposed_row(most)), columns(width * kGroup);
    const Scratch<float> scores(in_groups(most) * kGroup), sums(width * kGroup);
    const Scratch<uint16_t> weights(in_groups(most) * kGroup);
    for (int64_t task; (task = take()) < tasks;) {
      const Segment& segment = segments.all[task / groups];
      const int64_t b = segment.row, group = task % groups, ldv = transposed_row(segment.keys);
      transpose_rows(v.at(b, group, segment.key), v.row, segment.keys, features, values.data(), ldv);
      for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h)
        for (int64_t start = 0; start < segment.queries; start += kGroup) {
          const int64_t query = segment.query + start, row = b * queries + query;
          const int64_t count = std::min(kGroup, segment.queries - start);
          const Group seen(segments.firsts.data() + row, segments.lasts.data() + row, count);
          pack_columns(q.at(b, h, query), q.row, count, features, columns.data());
          products.template product<Into::kFloat>(
              k.at(b, group, segment.key + seen.start), k.row, std::min(seen.padded(), segment.keys - seen.start),
              {columns.data(), width * kLanes, features, kGroup}, scores.data(), kGroup);

          __m512 top[2], total[2];
          top[0] = top[1] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
          total[0] = total[1] = _mm512_setzero_ps();
          seen.over_pairs([&](int64_t key, auto shared) __attribute__((always_inline)) {
            for (int i = 0; i < 2; ++i)
              for (int half = 0; half < 2; ++half) {
                const float* s = scores.data() + (key + i) * kGroup + half * kLanes;
                const __m512 t = _mm512_mul_ps(_mm512_load_ps(s), scale_lanes);
                if constexpr (shared)
                  top[half] = _mm512_max_ps(top[half], t);
                else
                  top[half] = _mm512_mask_max_ps(top[half], seen.seen(half, key + i), top[half], t);
              }
          });
          const int64_t stride = seen.padded() * kLanes;
          seen.over_pairs([&](int64_t key, auto shared) __attribute__((always_inline)) {
            __m512 p[2][2];
            for (int i = 0; i < 2; ++i)
              for (int half = 0; half < 2; ++half) {
                const float* s = scores.data() + (key + i) * kGroup + half * kLanes;
                p[i][half] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(s), scale_lanes, top[half]));
                if constexpr (!shared) p[i][half] = _mm512_maskz_mov_ps(seen.seen(half, key + i), p[i][half]);
                total[half] = _mm512_add_ps(total[half], p[i][half]);
              }
            store_pair(weights.data(), stride, key, narrow_both(p[0]), narrow_both(p[1]));
          });
          products.template product<Into::kFloat>(
              reinterpret_cast<const bf16*>(values.data()) + seen.start, ldv, width,
              {weights.data(), stride, seen.count, kGroup}, sums.data(), kGroup);

          float tops[kGroup], totals[kGroup], inverses[kGroup];
          for (int half = 0; half < 2; ++half) {
            _mm512_storeu_ps(tops + half * kLanes, top[half]);
            _mm512_storeu_ps(totals + half * kLanes, total[half]);
          }
          for (int64_t m = 0; m < count; ++m) {
            inverses[m] = totals[m] > 0.0f ? 1.0f / totals[m] : 0.0f;
            lse[(b * heads + h) * queries + query + m] = tops[m] * kLn2 + std::log(totals[m]);
          }
          store_queries(sums.data(), inverses, count, features, o + (row * heads + h) * features, heads * features);
        }
    }
  });
  return {o_t, lse_t};
}

template <typename Products>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& do_any, const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
    const at::Tensor& lse_t, const at::Tensor& first, const at::Tensor& last, double scale) {
  const at::Tensor q_t = with_unit_features(q_any), k_t = with_unit_features(k_any), v_t = with_unit_features(v_any);
  const at::Tensor do_t = with_unit_features(do_any);
  const int64_t heads = q_t.size(1), queries = q_t.size(2), features = q_t.size(3);
  const int64_t keys = k_t.size(2), groups = k_t.size(1), per_group = heads / groups;
  at::Tensor dq_t = at::empty(q_t.sizes(), q_t.options());
  at::Tensor dk_t = at::empty(k_t.sizes(), q_t.options()), dv_t = at::empty(k_t.sizes(), q_t.options());
  const Heads<bf16> q(q_t), k(k_t), v(v_t), dO(do_t);
  bf16* dq = dq_t.mutable_data_ptr<bf16>();
  bf16* dk = dk_t.mutable_data_ptr<bf16>();
  bf16* dv = dv_t.mutable_data_ptr<bf16>();
  const float* lse = lse_t.const_data_ptr<float>();
  const Segments segments(first, last, keys);
  const __m512 scale_lanes = _mm512_set1_ps(static_cast<float>(scale) * kLog2e);
  const int64_t width = in_groups(features), most = segments.most_keys;
  const int64_t tasks = static_cast<int64_t>(segments.all.size()) * groups;
  float scales[kGroup];
  std::fill_n(scales, kGroup, static_cast<float>(scale));

  on_threads(tasks, [&](auto take) {
    Products products;
    const Scratch<uint16_t> keys_transposed(width * transposed_row(most));
    const Scratch<uint16_t> columns(width * kGroup), rows(width * kQueries);
    const Scratch<float> dk_sums(most * width), dv_sums(most * width), sums(width * kGroup);
    const Scratch<float> scores(in_groups(most) * kGroup), dweights(in_groups(most) * kGroup);
    const Scratch<uint16_t> pairs(in_groups(most) * kGroup);
    // Pᵀ and dSᵀ of a block, without the scale that every dS carries.
    const Scratch<uint16_t> weights((most + kGroup) * kQueries), dscores((most + kGroup) * kQueries);
    for (int64_t task; (task = take()) < tasks;) {
      const Segment& segment = segments.all[task / groups];
      const int64_t b = segment.row, group = task % groups, ldk = transposed_row(segment.keys);
      transpose_rows(k.at(b, group, segment.key), k.row, segment.keys, features, keys_transposed.data(), ldk);
      std::fill_n(dk_sums.data(), segment.keys * width, 0.0f);
      std::fill_n(dv_sums.data(), segment.keys * width, 0.0f);
      for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h)
        for (int64_t block = segment.query, past = block + segment.queries; block < past; block += kQueries) {
          const int64_t block_count = std::min(kQueries, past - block);
          const auto group_at = [&](int64_t start) {
            const int64_t row = b * queries + start;
            return Group(
                segments.firsts.data() + row, segments.lasts.data() + row, std::min(kGroup, past - start));
          };
          int64_t from = segment.keys, to = 0;  // counted from the segment's first key, as all keys below
          for (int64_t start = block; start < block + block_count; start += kGroup) {
            const Group seen = group_at(start);
            if (seen.count == 0) continue;
            from = std::min(from, seen.start);
            to = std::max(to, seen.end());
          }
          for (int64_t start = block; start < block + block_count; start += kGroup) {
            const Group seen = group_at(start);
            const int64_t count = std::min(kGroup, past - start);
            const int64_t seen_rows = std::min(seen.padded(), segment.keys - seen.start);
            const int64_t lowest = segment.key + seen.start;
            const Panels panels{columns.data(), width * kLanes, features, kGroup};
            pack_columns(q.at(b, h, start), q.row, count, features, columns.data());
            products.template product<Into::kFloat>(
                k.at(b, group, lowest), k.row, seen_rows, panels, scores.data(), kGroup);
            pack_columns(dO.at(b, h, start), dO.row, count, features, columns.data());
            products.template product<Into::kFloat>(
                v.at(b, group, lowest), v.row, seen_rows, panels, dweights.data(), kGroup);

            uint16_t* const p_rows = weights.data() + (start - block);
            uint16_t* const ds_rows = dscores.data() + (start - block);
            const auto clear = [&](int64_t at, int64_t end) {
              for (; at < end; ++at) {
                _mm512_store_si512(p_rows + at * kQueries, _mm512_setzero_si512());
                _mm512_store_si512(ds_rows + at * kQueries, _mm512_setzero_si512());
              }
            };
            clear(from, std::min(seen.start, to));
            clear(std::max(from, seen.start + seen.padded()), to);
            __m512 shift[2], mean[2];
            for (int half = 0; half < 2; ++half) {
              const __mmask16 real = first_lanes(std::max<int64_t>(count - half * kLanes, 0));
              const float* at = lse + (b * heads + h) * queries + start + half * kLanes;
              shift[half] = _mm512_mul_ps(_mm512_maskz_loadu_ps(real, at), _mm512_set1_ps(kLog2e));
              mean[half] = _mm512_setzero_ps();
            }
            // D = Σ_j P_j dP_j from the very numbers it is taken off: where a query sees few keys they cancel exactly,
            // which do · o, rounded with o, would not.
            seen.over_pairs([&](int64_t key, auto shared) __attribute__((always_inline)) {
              for (int j = 0; j < 2; ++j) {
                __m512 p[2];
                for (int half = 0; half < 2; ++half) {
                  float* const s = scores.data() + (key + j) * kGroup + half * kLanes;
                  const __m512 dp = _mm512_load_ps(dweights.data() + (key + j) * kGroup + half * kLanes);
                  p[half] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(s), scale_lanes, shift[half]));
                  if constexpr (shared) {
                    mean[half] = _mm512_fmadd_ps(p[half], dp, mean[half]);
                  } else {
                    const __mmask16 mask = seen.seen(half, key + j);
                    p[half] = _mm512_maskz_mov_ps(mask, p[half]);
                    mean[half] = _mm512_mask3_fmadd_ps(p[half], dp, mean[half], mask);
                  }
                  _mm512_store_ps(s, p[half]);
                }
                _mm512_store_si512(p_rows + (seen.start + key + j) * kQueries, narrow_both(p));
              }
            });
            const int64_t stride = seen.padded() * kLanes;
            seen.over_pairs([&](int64_t key, auto shared) __attribute__((always_inline)) {
              __m512i both[2];
              for (int j = 0; j < 2; ++j) {
                __m512 ds[2];
                for (int half = 0; half < 2; ++half) {
                  const int64_t at = (key + j) * kGroup + half * kLanes;
                  const __m512 p = _mm512_load_ps(scores.data() + at);
                  const __m512 centred = _mm512_sub_ps(_mm512_load_ps(dweights.data() + at), mean[half]);
                  if constexpr (shared)
                    ds[half] = _mm512_mul_ps(p, centred);
                  else
                    ds[half] = _mm512_maskz_mul_ps(seen.seen(half, key + j), p, centred);
                }
                both[j] = narrow_both(ds);
                _mm512_store_si512(ds_rows + (seen.start + key + j) * kQueries, both[j]);
              }
              store_pair(pairs.data(), stride, key, both[0], both[1]);
            });
            products.template product<Into::kFloat>(
                reinterpret_cast<const bf16*>(keys_transposed.data()) + seen.start, ldk, width,
                {pairs.data(), stride, seen.count, kGroup}, sums.data(), kGroup);
            store_queries(
                sums.data(), scales, count, features, dq + ((b * heads + h) * queries + start) * features, features);
          }
          const int64_t inner = in_groups(block_count);
          const auto add = [&](const Scratch<uint16_t>& left, const Heads<bf16>& z, const Scratch<float>& into) {
            pack_rows(z.at(b, h, block), z.row, block_count, features, rows.data());
            products.template product<Into::kAddFloat>(
                reinterpret_cast<const bf16*>(left.data()) + from * kQueries, kQueries, std::max<int64_t>(to - from, 0),
                {rows.data(), inner * kLanes, inner, width}, into.data() + from * width, width);
          };
          add(weights, dO, dv_sums);
          add(dscores, q, dk_sums);
        }
      const int64_t offset = ((b * groups + group) * keys + segment.key) * features;
      store_rows(dk_sums.data(), static_cast<float>(scale), segment.keys, features, dk + offset);
      store_rows(dv_sums.data(), 1.0f, segment.keys, features, dv + offset);
    }
  });
  return {dq_t, dk_t, dv_t};
}

}  // namespace

namespace attention_bf16 {

bool serves(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && instruction_set() >= InstructionSet::kAvx512Bf16;
}

std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& first, const at::Tensor& last,
    double scale) {
  return (tile_registers_in_use() ? aletheia::forward<TileProducts> : aletheia::forward<VectorProducts>)(
      q, k, v, first, last, scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& dO, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lse,
    const at::Tensor& first, const at::Tensor& last, double scale) {
  return (tile_registers_in_use() ? aletheia::backward<TileProducts> : aletheia::backward<VectorProducts>)(
      dO, q, k, v, lse, first, last, scale);
}

}  // namespace attention_bf16
}  // namespace aletheia

#pragma GCC pop_options

#else

namespace aletheia::attention_bf16 {

bool serves(at::ScalarType) { return false; }

std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, double) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}

}  // namespace aletheia::attention_bf16

#endif
