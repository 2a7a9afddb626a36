// A batch of attention, each of whose queries sees one range of keys, cut into parts that have no key in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace aletheia {
namespace {

constexpr int64_t kFewQueries = 32;

// Some queries in succession of one row of the batch, and the keys in succession that they and no others may see.
struct Segment {
  int64_t row, query, queries, key, keys;
};

// The batch as segments, with ranges counted from each segment's first key.
struct Segments {
  std::vector<Segment> all;
  std::vector<int32_t> firsts, lasts;  // [batch, queries]
  int64_t most_keys = 0;

  // A row of the batch is cut where no later query sees a key of an earlier one: a packed row into its examples. Every
  // key is in a segment, whether it is seen or not, since its gradient has to be written.
  Segments(const at::Tensor& first, const at::Tensor& last, int64_t keys)
      : firsts(first.const_data_ptr<int32_t>(), first.const_data_ptr<int32_t>() + first.numel()),
        lasts(last.const_data_ptr<int32_t>(), last.const_data_ptr<int32_t>() + last.numel()) {
    const int64_t batch = first.size(0), queries = first.size(1);
    std::vector<int64_t> least(queries);  // first key that a query or any later one sees
    for (int64_t row = 0; row < batch; ++row) {
      const int32_t* const f = firsts.data() + row * queries;
      const int32_t* const l = lasts.data() + row * queries;
      int64_t lowest = keys;
      for (int64_t t = queries - 1; t >= 0; --t) {
        if (f[t] < l[t]) lowest = std::min<int64_t>(lowest, f[t]);
        least[t] = lowest;
      }
      Segment segment{row, 0, 0, 0, 0};
      int64_t reach = 0;
      for (int64_t t = 0; t < queries; ++t) {
        // Queries are computed in groups of so many: a shorter segment would not be worth its own.
        if (t - segment.query >= kFewQueries && reach > segment.key && least[t] >= reach && least[t] < keys) {
          add(segment, t, reach);
          segment = {row, t, 0, reach, 0};
        }
        if (f[t] < l[t]) reach = std::max<int64_t>(reach, l[t]);
      }
      add(segment, queries, keys);
    }
    for (const Segment& segment : all)
      for (int64_t at = segment.row * queries + segment.query, end = at + segment.queries; at < end; ++at) {
        const bool sees = firsts[at] < lasts[at];
        firsts[at] = sees ? firsts[at] - static_cast<int32_t>(segment.key) : 0;
        lasts[at] = sees ? lasts[at] - static_cast<int32_t>(segment.key) : 0;
      }
  }

 private:
  void add(Segment segment, int64_t query_end, int64_t key_end) {
    segment.queries = query_end - segment.query;
    segment.keys = key_end - segment.key;
    most_keys = std::max(most_keys, segment.keys);
    all.push_back(segment);
  }
};

}  // namespace
}  // namespace aletheia
