// The softmax of attention over strips of scores, a query a lane, for the instruction set of low_rank_vec.h, which includes
// this: maxima, sums and ranges go lane by lane.

namespace aletheia::low_rank {
namespace {

static_assert(kQueries % kLanes == 0);

// A weight below 2^-64 of the largest changes no sum of floats, and what it is multiplied with would be subnormal: numbers
// that take a hundred times as long.
constexpr float kNegligible = -64.0f;

// 2^t = 2^n 2^f for t <= 0, and 2^kNegligible for less; n is the integer next to t, 2^f the polynomial of degree 6 that is
// 1 at 0 and off by at most 2e-8 of it for |f| <= 1/2, less than its roundings. A NaN stays one, being less than nothing.
ALETHEIA_INLINE Floats power_of_two(Floats t) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: its last digit is worth 1
  t = t < kNegligible ? Floats{} + kNegligible : t;
  const Floats shifted = t + magic;
  const Floats f = t - (shifted - magic);
  Floats p = Floats{} + 1.5353363e-4f;
  p = p * f + 1.3398875e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  return p * (Floats)(((Ints)shifted << 23) + 0x3f800000);
}

ALETHEIA_INLINE Ints load_ints(const int32_t* p) { return *reinterpret_cast<const IntsInMemory*>(p); }

void softmax(
    float* scores, int64_t keys, int64_t position, const int32_t* first, const int32_t* last, float scale, float* tops,
    float* totals) {
  const Floats none = Floats{} - __builtin_inff();
  for (int64_t lane = 0; lane < kQueries; lane += kLanes) {
    const Ints from = load_ints(first + lane), past = load_ints(last + lane);
    float* const s = scores + lane;
    Floats top = none, total = {};
    for (int64_t key = 0; key < keys; ++key) {
      const Ints at = Ints{} + static_cast<int32_t>(position + key);
      const Floats t = load_vector(s + key * kQueries) * scale;
      const Ints higher = (from <= at) & (at < past) & (t > top);
      top = higher ? t : top;
      // Rounded for good: a product and a difference in one instruction would leave the top its rounding error.
      store_vector(t, s + key * kQueries);
    }
    for (int64_t key = 0; key < keys; ++key) {
      const Ints at = Ints{} + static_cast<int32_t>(position + key);
      const Floats t = load_vector(s + key * kQueries) - top;
      const Ints counts = (from <= at) & (at < past) & ~(t < kNegligible);
      const Floats weight = counts ? power_of_two(t) : Floats{};
      total += weight;
      store_vector(weight, s + key * kQueries);
    }
    const Floats share = total == 0.0f ? Floats{} : 1.0f / total;
    for (int64_t key = 0; key < keys; ++key)
      store_vector(load_vector(s + key * kQueries) * share, s + key * kQueries);
    store_vector(top, tops + lane);
    store_vector(total, totals + lane);
  }
}

void softmax_backward(const float* weights, float* dweights, int64_t keys) {
  for (int64_t lane = 0; lane < kQueries; lane += kLanes) {
    const float* const p = weights + lane;
    float* const dp = dweights + lane;
    Floats mean = {};
    for (int64_t key = 0; key < keys; ++key) mean += load_vector(p + key * kQueries) * load_vector(dp + key * kQueries);
    for (int64_t key = 0; key < keys; ++key)
      store_vector(
          load_vector(p + key * kQueries) * (load_vector(dp + key * kQueries) - mean), dp + key * kQueries);
  }
}

}  // namespace
}  // namespace aletheia::low_rank
