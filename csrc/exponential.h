// exp without branches, so that loops around it vectorise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace aletheia {

// exp(v) for v ≤ 0 by 2^n · 2^f with |f| ≤ 1/2 and a degree-6 Taylor polynomial of 2^f = exp(f ln 2), whose remainder
// (ln 2 / 2)^7 / 7! = 1.2e-7 is one float ulp. NaN for NaN.
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

}  // namespace aletheia
