// Squared norms of weight gradients (mathematics: aletheia_kernels/reference/grad_norm.py).
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <vector>

#include "clones.h"
#include "operators.h"

namespace aletheia {
namespace {

// A tile of the gradient is kept near this many elements, so that it is squared and summed while still in cache.
constexpr int64_t kTileElements = 1 << 18;
constexpr int64_t kTokenBlock = 512;

at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// Σ a_i b_i: sixteen float lanes a run of 4,096 elements, runs added in double.
template <typename T>
ALETHEIA_CLONES double sum_of_products_range(const T* a, const T* b, int64_t count) {
  constexpr int64_t kLanes = 16, kRun = 4096;
  using Lane = std::conditional_t<std::is_same_v<T, double>, double, float>;
  double total = 0.0;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t end = std::min(start + kRun, count), full = start + (end - start) / kLanes * kLanes;
    Lane lanes[kLanes] = {};
    for (int64_t i = start; i < full; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        lanes[lane] += static_cast<Lane>(a[i + lane]) * static_cast<Lane>(b[i + lane]);
    for (int64_t i = full; i < end; ++i) lanes[0] += static_cast<Lane>(a[i]) * static_cast<Lane>(b[i]);
    for (const Lane lane : lanes) total += lane;
  }
  return total;
}

// Σ a ⊙ b over two contiguous tensors of one shape; partial sums are added in a fixed order.
double sum_of_products(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kGrain = 32768;
  const int64_t count = a.numel(), chunks = (count + kGrain - 1) / kGrain;
  std::vector<double> partial(chunks, 0.0);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.scalar_type(), "aletheia_dot", [&] {
    const scalar_t* left = a.const_data_ptr<scalar_t>();
    const scalar_t* right = b.const_data_ptr<scalar_t>();
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t begin = chunk * kGrain;
        partial[chunk] = sum_of_products_range(left + begin, right + begin, std::min(kGrain, count - begin));
      }
    });
  });
  double total = 0.0;
  for (const double part : partial) total += part;
  return total;
}

double by_tiles(const at::Tensor& x, const at::Tensor& dy) {
  const int64_t rows = std::max<int64_t>(16, kTileElements / std::max<int64_t>(1, x.size(1)));
  double total = 0.0;
  at::Tensor buffer = at::empty({std::min(rows, dy.size(1)), x.size(1)}, x.options());
  for (int64_t start = 0; start < dy.size(1); start += rows) {
    const int64_t count = std::min(rows, dy.size(1) - start);
    at::Tensor tile = buffer.narrow(0, 0, count);
    at::mm_out(tile, dy.narrow(1, start, count).t(), x);
    total += sum_of_products(tile, tile);
  }
  return total;
}

double by_gram(const at::Tensor& x, const at::Tensor& dy) {
  // Gram entries of both signs cancel in the sum, so they are formed from operands widened to float32.
  const at::Tensor wide_x = x.to(wide(x.scalar_type())), wide_dy = dy.to(wide(x.scalar_type()));
  double total = 0.0;
  for (int64_t start = 0; start < x.size(0); start += kTokenBlock) {
    const int64_t rows = std::min(kTokenBlock, x.size(0) - start);
    const at::Tensor rows_x = wide_x.narrow(0, start, rows), rows_dy = wide_dy.narrow(0, start, rows);
    // Both Gram matrices are symmetric: blocks right of the diagonal count twice.
    for (int64_t other = start; other < x.size(0); other += kTokenBlock) {
      const int64_t columns = std::min(kTokenBlock, x.size(0) - other);
      const at::Tensor gram_x = at::mm(rows_x, wide_x.narrow(0, other, columns).t());
      const at::Tensor gram_dy = at::mm(rows_dy, wide_dy.narrow(0, other, columns).t());
      total += (other == start ? 1.0 : 2.0) * sum_of_products(gram_x, gram_dy);
    }
  }
  return std::max(total, 0.0);
}

// Multiply-adds a token: T (K + N) / 2 for the symmetric Gram form, K N for tiles. For 2-byte dtypes the Gram form
// runs in float32, which the processors that have 2-byte products run about five times slower.
bool gram_is_cheaper(const at::Tensor& x, const at::Tensor& dy) {
  const double tokens = x.size(0), in = x.size(1), out = dy.size(1), rate = x.element_size() < 4 ? 5.0 : 1.0;
  return rate * tokens * (in + out) / 2.0 < in * out;
}

}  // namespace

at::Tensor weight_grad_norm_sq(const at::Tensor& x, const at::Tensor& dy, c10::string_view method) {
  const bool gram = method == "gram" || (method == "auto" && gram_is_cheaper(x, dy));
  const double total = gram ? by_gram(x, dy) : by_tiles(x, dy);
  return at::scalar_tensor(total, x.options().dtype(wide(x.scalar_type())));
}

std::tuple<at::Tensor, at::Tensor> weight_grad_norm_sq_sketch(
    const at::Tensor& x, const at::Tensor& dy, const at::Tensor& omega) {
  const at::Tensor sketch = at::mm(dy.t(), at::mm(x, omega.to(x.scalar_type())));
  const at::Tensor columns = sketch.to(wide(x.scalar_type())).square_().sum(0);
  return {columns.mean(), columns.std() / std::sqrt(static_cast<double>(omega.size(1)))};
}

at::Tensor embedding_grad_norm_sq(const at::Tensor& indices, const at::Tensor& dy) {
  const auto [distinct, slot, counts] = at::_unique2(indices, /*sorted=*/true, /*return_inverse=*/true);
  const auto dtype = wide(dy.scalar_type());
  at::Tensor rows = at::zeros({distinct.numel(), dy.size(1)}, dy.options().dtype(dtype));
  rows.index_add_(0, slot, dy.to(dtype));
  return at::scalar_tensor(sum_of_products(rows, rows), rows.options());
}

at::Tensor bias_grad_norm_sq(const at::Tensor& dy) {
  const at::Tensor sum = dy.sum(at::IntArrayRef{0}, /*keepdim=*/false, wide(dy.scalar_type()));
  return at::scalar_tensor(sum_of_products(sum, sum), sum.options());
}

}  // namespace aletheia
