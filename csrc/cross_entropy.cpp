// Linear + cross entropy in row blocks (mathematics: aletheia_kernels/reference/cross_entropy.py).
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "clones.h"
#include "operators.h"

namespace aletheia {
namespace {

// Logits held at once, in elements: 128 rows of a 49,152-word vocabulary.
constexpr int64_t kBlockElements = int64_t{128} * 49152;

// exp(v) for v ≤ 0 by 2^n · 2^f with |f| ≤ 1/2 and a degree-6 Taylor polynomial of 2^f = exp(f ln 2), whose remainder
// (ln 2 / 2)^7 / 7! = 1.2e-7 is one float ulp. Branch-free, so the compiler vectorises the loop around it.
inline float exp_nonpositive(float v) {
  const float t = std::max(v, -87.0f) * 1.44269504f;
  const float n = std::nearbyint(t), u = (t - n) * 0.693147181f;
  float p = 1.0f / 720.0f;
  p = p * u + 1.0f / 120.0f;
  p = p * u + 1.0f / 24.0f;
  p = p * u + 1.0f / 6.0f;
  p = p * u + 0.5f;
  p = p * u + 1.0f;
  p = p * u + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}
inline double exp_nonpositive(double v) { return std::exp(v); }

// One row of logits z [count]: returns logsumexp(z) - z[label] and, if asked, overwrites z with dz.
// scratch [count] holds the row widened.
template <typename T, typename Wide>
ALETHEIA_CLONES double row(T* z, Wide* scratch, int64_t count, int64_t label, Wide softcap, bool needs_dz) {
  constexpr int64_t kLanes = 16;
  for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<Wide>(z[i]);
  if (softcap > 0)
    for (int64_t i = 0; i < count; ++i) scratch[i] = softcap * std::tanh(scratch[i] / softcap);
  const Wide target = scratch[label];

  Wide top[kLanes];
  for (Wide& lane : top) lane = -std::numeric_limits<Wide>::infinity();
  const int64_t full = count / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      top[lane] = scratch[i + lane] > top[lane] ? scratch[i + lane] : top[lane];
  Wide maximum = -std::numeric_limits<Wide>::infinity();
  for (const Wide lane : top) maximum = std::max(maximum, lane);
  for (int64_t i = full; i < count; ++i) maximum = std::max(maximum, scratch[i]);

  // dz needs exp(z - max) and, under a soft cap, the capped z: the latter is made again from z, which still holds it.
  Wide sums[kLanes] = {};
  for (int64_t i = 0; i < full; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      scratch[i + lane] = exp_nonpositive(scratch[i + lane] - maximum);
      sums[lane] += scratch[i + lane];
    }
  for (int64_t i = full; i < count; ++i) {
    scratch[i] = exp_nonpositive(scratch[i] - maximum);
    sums[0] += scratch[i];
  }
  double sum = 0.0;
  for (const Wide lane : sums) sum += lane;

  if (needs_dz) {
    const Wide inverse = static_cast<Wide>(1.0 / sum);
    if (softcap > 0) {
      for (int64_t i = 0; i < count; ++i) {
        const Wide capped = std::tanh(static_cast<Wide>(z[i]) / softcap);
        const Wide dcapped = scratch[i] * inverse - (i == label ? Wide{1} : Wide{0});
        z[i] = static_cast<T>(dcapped * (Wide{1} - capped * capped));
      }
    } else {
      const Wide at_label = scratch[label] * inverse - Wide{1};
      for (int64_t i = 0; i < count; ++i) z[i] = static_cast<T>(scratch[i] * inverse);
      z[label] = static_cast<T>(at_label);
    }
  }
  return std::log(sum) + static_cast<double>(maximum) - static_cast<double>(target);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_forward(
    const at::Tensor& h, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& labels,
    double softcap, bool needs_dh) {
  const int64_t count = h.size(0), vocabulary = weight.size(0);
  const int64_t rows = std::max<int64_t>(16, kBlockElements / std::max<int64_t>(1, vocabulary));
  at::Tensor dh = needs_dh ? at::empty(h.sizes(), h.options()) : at::empty({0}, h.options());
  at::Tensor logits = at::empty({std::min(rows, count), vocabulary}, h.options());
  const at::Tensor target = labels.contiguous();
  const int64_t* label = target.const_data_ptr<int64_t>();
  std::vector<double> losses(count, 0.0);
  for (int64_t start = 0; start < count; start += rows) {
    const int64_t block = std::min(rows, count - start);
    at::Tensor z = logits.narrow(0, 0, block);
    const at::Tensor rows_h = h.narrow(0, start, block);
    if (bias.has_value()) {
      at::addmm_out(z, *bias, rows_h, weight.t());
    } else {
      at::mm_out(z, rows_h, weight.t());
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "aletheia_cross_entropy", [&] {
      using Wide = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
      scalar_t* data = z.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, block, 1, [&](int64_t first, int64_t last) {
        std::vector<Wide> scratch(vocabulary);
        for (int64_t i = first; i < last; ++i)
          losses[start + i] = row<scalar_t, Wide>(
              data + i * vocabulary, scratch.data(), vocabulary, label[start + i], static_cast<Wide>(softcap),
              needs_dh);
      });
    });
    if (needs_dh) {
      at::Tensor rows_dh = dh.narrow(0, start, block);
      at::mm_out(rows_dh, z, weight);
    }
  }
  double loss = 0.0;
  for (const double one : losses) loss += one;
  return {at::scalar_tensor(loss, h.options().dtype(wide(h.scalar_type()))), dh};
}

}  // namespace aletheia
