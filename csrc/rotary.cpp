// Rotary embedding, forward and backward (mathematics: aletheia_kernels/reference/rotary.py): q and k are read once, where
// they lie, and written once.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "clones.h"
#include "convert.h"
#include "operators.h"

namespace aletheia {
namespace {

// Elements that are worth waking another thread for.
constexpr int64_t kGrain = 16384;

// The heads of one token, x[head * stride] to out[head * dim]. turns [4, half] holds what the first half takes of the
// first and of the second, then what the second half takes of the second and of the first.
template <typename T>
ALETHEIA_CLONES void turn_heads(
    const T* __restrict x, int64_t stride, const Wide<T>* __restrict turns, T* __restrict out, int64_t heads,
    int64_t half, int64_t dim) {
  using W = Wide<T>;
  const W *own1 = turns, *other1 = turns + half, *own2 = turns + 2 * half, *other2 = turns + 3 * half;
  for (int64_t head = 0; head < heads; ++head, x += stride, out += dim) {
    for (int64_t i = 0; i < half; ++i) {
      const W first = to_wide(x[i]), second = to_wide(x[half + i]);
      out[i] = from_wide<T>(first * own1[i] + second * other1[i]);
      out[half + i] = from_wide<T>(second * own2[i] + first * other2[i]);
    }
    for (int64_t i = 2 * half; i < dim; ++i) out[i] = x[i];
  }
}

at::Tensor unit_stride(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// Memory [batch, tokens, heads, dim], returned as [batch, heads, tokens, dim].
at::Tensor heads_last(const at::Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

std::tuple<at::Tensor, at::Tensor> turned(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  const at::Tensor sources[] = {unit_stride(q), unit_stride(k)};
  at::Tensor outs[] = {heads_last(q), heads_last(k)};
  const auto wide_dtype = wide(q.scalar_type());
  const at::Tensor c = cos.to(wide_dtype).contiguous(), s = sin.to(wide_dtype).contiguous();
  const int64_t batch = q.size(0), tokens = q.size(2), dim = q.size(3), rotated = c.size(2), half = rotated / 2;
  const int64_t angles_stride = c.size(0) == 1 ? 0 : tokens * rotated;
  const int64_t a_token = std::max<int64_t>(1, (q.size(1) + k.size(1)) * dim);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "aletheia_rotary", [&] {
    using W = Wide<scalar_t>;
    const W *cosines = c.const_data_ptr<W>(), *sines = s.const_data_ptr<W>();
    const scalar_t* from[] = {sources[0].const_data_ptr<scalar_t>(), sources[1].const_data_ptr<scalar_t>()};
    scalar_t* to[] = {outs[0].mutable_data_ptr<scalar_t>(), outs[1].mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, batch * tokens, std::max<int64_t>(1, kGrain / a_token), [&](int64_t first, int64_t last) {
      std::vector<W> turns(2 * rotated);
      for (int64_t index = first; index < last; ++index) {
        const int64_t b = index / tokens, t = index % tokens;
        const W *cos_t = cosines + b * angles_stride + t * rotated, *sin_t = sines + (cos_t - cosines);
        for (int64_t i = 0; i < half; ++i) {
          const W sin1 = sin_t[i], sin2 = sin_t[half + i];
          turns[i] = cos_t[i];
          turns[half + i] = inverse ? sin2 : -sin1;
          turns[2 * half + i] = cos_t[half + i];
          turns[3 * half + i] = inverse ? -sin1 : sin2;
        }
        for (int which = 0; which < 2; ++which) {
          const at::Tensor &source = sources[which], &out = outs[which];
          turn_heads<scalar_t>(
              from[which] + b * source.stride(0) + t * source.stride(2), source.stride(1), turns.data(),
              to[which] + index * out.size(1) * dim, out.size(1), half, dim);
        }
      }
    });
  });
  return {outs[0], outs[1]};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rotary_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  return turned(q, k, cos, sin, false);
}

std::tuple<at::Tensor, at::Tensor> rotary_backward(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin) {
  return turned(dq, dk, cos, sin, true);
}

}  // namespace aletheia
