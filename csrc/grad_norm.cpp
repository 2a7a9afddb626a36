// Squared norms of weight gradients (mathematics: aletheia_kernels/reference/grad_norm.py).
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

#include "clones.h"
#include "operators.h"

namespace aletheia {
namespace {

// A tile of the gradient is kept near this many elements, so that it is squared and summed while still in cache.
constexpr int64_t kTileElements = 1 << 18;
constexpr int64_t kTokenBlock = 512;
// Rounding error of one Gram term in units of float32's ε (dot products of about a thousand terms), and the relative
// error that the automatic choice lets the Gram form have.
constexpr double kGramNoiseUnits = 16.0, kGramTolerance = 1e-5;

struct Sums {
  double first = 0.0;   // Σ p
  double second = 0.0;  // Σ p²
};

// Σ p and Σ p² of the products p_i = a_i b_i: sixteen float lanes a run of 4,096 elements, runs added in double.
template <typename T>
ALETHEIA_CLONES Sums product_sums_range(const T* a, const T* b, int64_t count) {
  constexpr int64_t kLanes = 16, kRun = 4096;
  using Lane = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Sums total;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t end = std::min(start + kRun, count), full = start + (end - start) / kLanes * kLanes;
    Lane first[kLanes] = {}, second[kLanes] = {};
    for (int64_t i = start; i < full; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Lane p = static_cast<Lane>(a[i + lane]) * static_cast<Lane>(b[i + lane]);
        first[lane] += p;
        second[lane] += p * p;
      }
    for (int64_t i = full; i < end; ++i) {
      const Lane p = static_cast<Lane>(a[i]) * static_cast<Lane>(b[i]);
      first[0] += p;
      second[0] += p * p;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      total.first += first[lane];
      total.second += second[lane];
    }
  }
  return total;
}

// The same over two contiguous tensors of one shape; partial sums are added in a fixed order.
Sums product_sums(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kGrain = 32768;
  const int64_t count = a.numel(), chunks = (count + kGrain - 1) / kGrain;
  std::vector<Sums> partial(chunks);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.scalar_type(), "aletheia_product_sums", [&] {
    const scalar_t* left = a.const_data_ptr<scalar_t>();
    const scalar_t* right = b.const_data_ptr<scalar_t>();
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t begin = chunk * kGrain;
        partial[chunk] = product_sums_range(left + begin, right + begin, std::min(kGrain, count - begin));
      }
    });
  });
  Sums total;
  for (const Sums& part : partial) {
    total.first += part.first;
    total.second += part.second;
  }
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
    total += product_sums(tile, tile).first;
  }
  return total;
}

struct Gram {
  double total;
  bool trusted;
};

// Gram entries of both signs cancel, so they are formed from operands widened to float32. The rounding errors of the
// terms p are independent to first order: together about a few ε √(Σ p²), which has to be small beside the sum.
Gram by_gram(const at::Tensor& x, const at::Tensor& dy) {
  const at::Tensor wide_x = x.to(wide(x.scalar_type())), wide_dy = dy.to(wide(x.scalar_type()));
  double total = 0.0, squares = 0.0;
  for (int64_t start = 0; start < x.size(0); start += kTokenBlock) {
    const int64_t rows = std::min(kTokenBlock, x.size(0) - start);
    const at::Tensor rows_x = wide_x.narrow(0, start, rows), rows_dy = wide_dy.narrow(0, start, rows);
    // Both Gram matrices are symmetric: blocks right of the diagonal count twice.
    for (int64_t other = start; other < x.size(0); other += kTokenBlock) {
      const int64_t columns = std::min(kTokenBlock, x.size(0) - other);
      const at::Tensor gram_x = at::mm(rows_x, wide_x.narrow(0, other, columns).t());
      const at::Tensor gram_dy = at::mm(rows_dy, wide_dy.narrow(0, other, columns).t());
      const Sums sums = product_sums(gram_x, gram_dy);
      const double weight = other == start ? 1.0 : 2.0;
      total += weight * sums.first;
      squares += weight * weight * sums.second;
    }
  }
  const double epsilon = wide_x.scalar_type() == at::kDouble ? 0x1p-52 : 0x1p-23;
  return {std::max(total, 0.0), kGramNoiseUnits * epsilon * std::sqrt(squares) <= kGramTolerance * total};
}

// Multiply-adds a token: T (K + N) / 2 for the symmetric Gram form, K N for tiles. For 2-byte dtypes the Gram form
// runs in float32, which the processors that have 2-byte products run about five times slower.
bool gram_is_cheaper(const at::Tensor& x, const at::Tensor& dy) {
  const double tokens = x.size(0), in = x.size(1), out = dy.size(1), rate = x.element_size() < 4 ? 5.0 : 1.0;
  return rate * tokens * (in + out) / 2.0 < in * out;
}

}  // namespace

at::Tensor weight_grad_norm_sq(const at::Tensor& x, const at::Tensor& dy, c10::string_view method) {
  const auto options = x.options().dtype(wide(x.scalar_type()));
  if (method == "gram" || (method == "auto" && gram_is_cheaper(x, dy))) {
    const Gram gram = by_gram(x, dy);
    if (method == "gram" || gram.trusted) return at::scalar_tensor(gram.total, options);
  }
  return at::scalar_tensor(by_tiles(x, dy), options);
}

at::Tensor weight_grad_norms_sq(at::TensorList xs, at::TensorList dys) {
  std::vector<at::Tensor> norms;
  for (size_t i = 0; i < xs.size(); ++i) norms.push_back(weight_grad_norm_sq(xs[i], dys[i], "auto"));
  return at::stack(norms);
}

at::Tensor weight_grad_norm_sq_per_example(const at::Tensor& x, const at::Tensor& dy) {
  if (x.size(0) == 0) return at::empty({0}, x.options().dtype(wide(x.scalar_type())));
  return weight_grad_norms_sq(x.unbind(), dy.unbind());
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
  return at::scalar_tensor(product_sums(rows, rows).first, rows.options());
}

at::Tensor bias_grad_norm_sq(const at::Tensor& dy) {
  const at::Tensor sum = dy.sum(at::IntArrayRef{0}, /*keepdim=*/false, wide(dy.scalar_type()));
  return at::scalar_tensor(product_sums(sum, sum).first, sum.options());
}

}  // namespace aletheia
