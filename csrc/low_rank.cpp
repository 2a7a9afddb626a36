// The low-rank half of a LoRA group by the kernels of low_rank_kernels.h: shrink h = x̂ Aᵀ, expand y += h (s B)ᵀ,
// g = dy (s B) and dx += g A are row products, dB_iᵀ = s h_iᵀ dy_i and dA = gᵀ x̂ column products.
//
// Tokens are walked in blocks, one thread a run of blocks: a block is turned into float panels once, and serves g and
// dB, or dA, from cache. Each thread sums its own dA and dB, added in thread order: a run repeats bit for bit.
#include "low_rank.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>

#include "instruction_set.h"
#include "operators.h"

namespace aletheia::low_rank {

const KernelSet& kernel_set() {
#ifdef ALETHEIA_X86_SETS
  const InstructionSet set = instruction_set();
  if (set >= InstructionSet::kAvx512) return kAvx512Kernels;
  if (set == InstructionSet::kAvx2) return kAvx2Kernels;
#endif
  return kDefaultKernels;
}

namespace {

using at::BFloat16;

template <typename Body>  // body(T{}, kernel set)
void with_kernels(at::ScalarType dtype, Body body) {
  if (dtype == at::kFloat) {
    body(float{}, kernel_set());
  } else {
    body(BFloat16{}, kernel_set());
  }
}

int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

at::Tensor floats(int64_t count) { return at::empty({count}, at::kFloat); }

// A matrix read as float, rounded to T first: what the adapters are in the products.
template <typename T>
class Elements {
 public:
  explicit Elements(const at::Tensor& t)
      : data_(t.const_data_ptr()), wide_(t.scalar_type() == at::kFloat), row_(t.stride(0)), column_(t.stride(1)) {}
  float operator()(int64_t i, int64_t j) const {
    const int64_t at = i * row_ + j * column_;
    const float value =
        wide_ ? static_cast<const float*>(data_)[at] : static_cast<float>(static_cast<const BFloat16*>(data_)[at]);
    return static_cast<float>(static_cast<T>(value));
  }

 private:
  const void* data_;
  bool wide_;
  int64_t row_, column_;
};

// A packed operand that owns its data.
struct Operand {
  at::Tensor data;
  int64_t inner, outer;

  template <typename Element>  // element(k, n) as float
  Operand(int64_t lanes, int64_t inner, int64_t outer, Element element)
      : data(floats(rounded_up(outer, lanes) * inner)), inner(inner), outer(outer) {
    float* target = data.mutable_data_ptr<float>();
    for (int64_t first = 0; first < outer; first += lanes)
      for (int64_t k = 0; k < inner; ++k)
        for (int64_t n = first; n < first + lanes; ++n) *target++ = n < outer ? element(k, n) : 0.0f;
  }
  operator Packed() const { return {data.const_data_ptr<float>(), inner, outer}; }
};

// The stacked A as [inner, outer]: transposed for shrink, as it stands for the input gradient.
template <typename T>
Operand pack_stacked(int64_t lanes, at::TensorList lora_As, bool transposed) {
  const std::vector<int64_t> offsets = offsets_of(lora_As, 0);
  const std::vector<Elements<T>> elements(lora_As.begin(), lora_As.end());
  std::vector<size_t> owner;
  for (size_t i = 0; i < elements.size(); ++i) owner.resize(offsets[i + 1], i);
  const auto at_rank = [&](int64_t rank, int64_t k) { return elements[owner[rank]](rank - offsets[owner[rank]], k); };
  const int64_t ranks = offsets.back(), features = lora_As[0].size(1);
  if (transposed) return Operand(lanes, features, ranks, [&](int64_t k, int64_t n) { return at_rank(n, k); });
  return Operand(lanes, ranks, features, at_rank);
}

std::optional<Mask> mask_from(const std::optional<Dropout>& dropout, int64_t first) {
  if (!dropout) return std::nullopt;
  return Mask{dropout->seed, dropout->threshold, static_cast<float>(dropout->scale), first};
}

// A row of scratch a thread, each aligned as the kernels read fastest.
class Scratch {
 public:
  explicit Scratch(int64_t count) : size_(rounded_up(count, kAligned)), data_(floats(at::get_num_threads() * size_)) {}
  float* of_this_thread() { return data_.mutable_data_ptr<float>() + at::get_thread_num() * size_; }

 private:
  static constexpr int64_t kAligned = 16;  // floats: a cache line
  int64_t size_;
  at::Tensor data_;
};

// run(blocks) once for every run of blocks that a thread walks; blocks(body) calls body(start, count) for each of them.
template <typename Run>
void over_blocks(int64_t tokens, Run run) {
  at::parallel_for(0, (tokens + kTokens - 1) / kTokens, 1, [&](int64_t first, int64_t last) {
    run([&](auto body) {
      for (int64_t start = first * kTokens; start < std::min(last * kTokens, tokens); start += kTokens)
        body(start, std::min(kTokens, tokens - start));
    });
  });
}

template <typename T>
void forward_in(
    const KernelSet& set, const at::Tensor& x, at::TensorList lora_As, at::TensorList lora_Bs,
    at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout, at::TensorList ys, float* h) {
  const Kernels<T>& kernels = kernels_of<T>(set);
  const std::vector<int64_t> offsets = offsets_of(lora_As, 0);
  const int64_t ranks = offsets.back(), features = x.size(1), ld = x.stride(0), width = 2 * set.lanes;
  const Operand shrink = pack_stacked<T>(set.lanes, lora_As, /*transposed=*/true);
  std::vector<Operand> expands;  // s B, so that what is added comes out scaled
  std::vector<T*> targets;
  for (size_t i = 0; i < ys.size(); ++i) {
    const Elements<T> element(lora_Bs[i]);
    const float scaling = static_cast<float>(scalings[i]);
    expands.emplace_back(set.lanes, lora_Bs[i].size(1), lora_Bs[i].size(0), [&](int64_t k, int64_t n) {
      return element(n, k) * scaling;
    });
    targets.push_back(ys[i].mutable_data_ptr<T>());
  }
  const T* source = x.const_data_ptr<T>();
  const bool direct = std::is_same_v<T, float> && !dropout;  // x itself will do
  Scratch scratch(direct ? 0 : kTokens * rounded_up(features, width));
  over_blocks(x.size(0), [&](auto blocks) {
    float* panels = scratch.of_this_thread();
    blocks([&](int64_t start, int64_t count) {
      Rows rows{panels, width, kTokens * width};
      if constexpr (std::is_same_v<T, float>)
        if (direct) rows = {source + start * ld, ld, width};
      if (!direct) {
        const std::optional<Mask> mask = mask_from(dropout, start * features);
        kernels.load(source + start * ld, ld, count, features, mask ? &*mask : nullptr, panels);
      }
      float* h_block = h + start * ranks;
      kernels.rows(rows, count, shrink, h_block, ranks);
      for (size_t i = 0; i < ys.size(); ++i) {
        const int64_t out = expands[i].outer;
        kernels.add_rows({h_block + offsets[i], ranks, width}, count, expands[i], targets[i] + start * out, out);
      }
    });
  });
}

// Sums over tokens for dA and dB: a thread's own, dA in panels of columns [panels, ranks, width], then every dB_iᵀ so.
class TokenSums {
 public:
  TokenSums(int64_t width, at::TensorList dAs, at::TensorList dBs)
      : width_(width), features_(dAs[0].size(1)), offsets_(offsets_of(dAs, 0)) {
    starts_.push_back(ranks() * rounded_up(features_, width));
    for (const at::Tensor& dB : dBs) starts_.push_back(starts_.back() + dB.size(1) * rounded_up(dB.size(0), width));
    sums_ = at::zeros({at::get_num_threads(), starts_.back()}, at::kFloat);
  }

  int64_t ranks() const { return offsets_.back(); }
  int64_t offset(size_t i) const { return offsets_[i]; }
  float* dA_of_this_thread() { return sums_.mutable_data_ptr<float>() + at::get_thread_num() * starts_.back(); }
  float* dB_of_this_thread(size_t i) { return dA_of_this_thread() + starts_[i]; }

  void write(at::ArrayRef<double> scalings, at::TensorList dAs, at::TensorList dBs) const {
    const at::Tensor total = sums_.size(0) > 1 ? sums_.sum(0) : sums_[0];
    const auto panelled = [&](int64_t start, int64_t rows, int64_t columns) {
      const int64_t panels = rounded_up(columns, width_) / width_;
      return total.narrow(0, start, panels * rows * width_).view({panels, rows, width_});
    };
    const at::Tensor dA = panelled(0, ranks(), features_)
                              .permute({1, 0, 2})
                              .reshape({ranks(), rounded_up(features_, width_)})
                              .narrow(1, 0, features_);
    for (size_t i = 0; i < dBs.size(); ++i) {
      const int64_t out = dBs[i].size(0), rank = dBs[i].size(1);
      dAs[i].copy_(dA.narrow(0, offsets_[i], rank));
      dBs[i].copy_(
          panelled(starts_[i], rank, out).permute({0, 2, 1}).reshape({rounded_up(out, width_), rank}).narrow(0, 0, out)
              .mul(scalings[i]));
    }
  }

 private:
  int64_t width_, features_;
  std::vector<int64_t> offsets_, starts_;
  at::Tensor sums_;
};

template <typename T>
void backward_in(
    const KernelSet& set, const std::vector<at::Tensor>& dys, const at::Tensor& x, const float* h,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout, T* g,
    at::TensorList dAs, at::TensorList dBs) {
  const Kernels<T>& kernels = kernels_of<T>(set);
  const int64_t features = x.size(1), width = 2 * set.lanes;
  TokenSums sums(width, dAs, dBs);
  const int64_t ranks = sums.ranks();
  std::vector<Operand> shrinks;  // s B, so that g comes out scaled
  int64_t widest = features;
  for (size_t i = 0; i < dys.size(); ++i) {
    const Elements<T> element(lora_Bs[i]);
    const float scaling = static_cast<float>(scalings[i]);
    const int64_t out = lora_Bs[i].size(0), rank = lora_Bs[i].size(1);
    shrinks.emplace_back(set.lanes, out, rank, [&](int64_t k, int64_t n) { return element(k, n) * scaling; });
    widest = std::max(widest, out);
  }
  Scratch scratch(kTokens * rounded_up(widest, width)), g_scratch(kTokens * ranks);
  const T* source = x.const_data_ptr<T>();
  over_blocks(x.size(0), [&](auto blocks) {
    float *panels = scratch.of_this_thread(), *g_block = g_scratch.of_this_thread();
    blocks([&](int64_t start, int64_t count) {
      const Rows rows{panels, width, kTokens * width};
      for (size_t i = 0; i < dys.size(); ++i) {
        const int64_t ld = dys[i].stride(0), out = shrinks[i].inner, rank = shrinks[i].outer, offset = sums.offset(i);
        kernels.load(dys[i].const_data_ptr<T>() + start * ld, ld, count, out, nullptr, panels);
        kernels.rows(rows, count, shrinks[i], g_block + offset, ranks);
        kernels.columns(h + start * ranks + offset, ranks, rank, count, panels, out, sums.dB_of_this_thread(i));
      }
      kernels.narrow(g_block, count * ranks, g + start * ranks);
      const std::optional<Mask> mask = mask_from(dropout, start * features);
      kernels.load(source + start * x.stride(0), x.stride(0), count, features, mask ? &*mask : nullptr, panels);
      kernels.columns(g_block, ranks, ranks, count, panels, features, sums.dA_of_this_thread());
    });
  });
  sums.write(scalings, dAs, dBs);
}

template <typename T>
void weight_gradients_in(
    const KernelSet& set, const std::vector<at::Tensor>& dys, const at::Tensor& x, const float* h, const float* g,
    at::ArrayRef<double> scalings, at::TensorList dAs, at::TensorList dBs) {
  const Kernels<T>& kernels = kernels_of<T>(set);
  TokenSums sums(2 * set.lanes, dAs, dBs);
  const int64_t ranks = sums.ranks();
  const auto add = [&](const float* c, int64_t rank, const at::Tensor& z, int64_t start, int64_t count, float* to) {
    const int64_t ld = z.stride(0);
    kernels.columns_of_rows(
        c + start * ranks, ranks, rank, count, z.const_data_ptr<T>() + start * ld, ld, z.size(1), to);
  };
  over_blocks(x.size(0), [&](auto blocks) {
    blocks([&](int64_t start, int64_t count) {
      for (size_t i = 0; i < dys.size(); ++i)
        add(h + sums.offset(i), dBs[i].size(1), dys[i], start, count, sums.dB_of_this_thread(i));
      add(g, ranks, x, start, count, sums.dA_of_this_thread());
    });
  });
  sums.write(scalings, dAs, dBs);
}

template <typename T>
void add_input_gradient_in(
    const KernelSet& set, const at::Tensor& g, at::TensorList lora_As, const std::optional<Dropout>& dropout, T* dx) {
  const Kernels<T>& kernels = kernels_of<T>(set);
  const Operand stacked = pack_stacked<T>(set.lanes, lora_As, /*transposed=*/false);
  const int64_t ranks = g.size(1), features = stacked.outer, width = 2 * set.lanes;
  const T* source = g.const_data_ptr<T>();
  Scratch g_scratch(kTokens * rounded_up(ranks, width)), scratch(dropout ? kTokens * features : 0);
  over_blocks(g.size(0), [&](auto blocks) {
    float *panels = g_scratch.of_this_thread(), *block = scratch.of_this_thread();
    blocks([&](int64_t start, int64_t count) {
      kernels.load(source + start * ranks, ranks, count, ranks, nullptr, panels);
      const Rows rows{panels, width, kTokens * width};
      T* target = dx + start * features;
      if (const std::optional<Mask> mask = mask_from(dropout, start * features)) {
        kernels.rows(rows, count, stacked, block, features);
        kernels.add_masked(block, count * features, *mask, target);
      } else {
        kernels.add_rows(rows, count, stacked, target, features);
      }
    });
  });
}

}  // namespace

// In float the baseline loses to a vendor library that chooses its own instruction set. In bfloat16 that library is far
// behind wherever it has no AVX512-BF16.
bool serves(at::ScalarType dtype) {
  return dtype == at::kBFloat16 || (dtype == at::kFloat && instruction_set() != InstructionSet::kDefault);
}

void forward(
    const at::Tensor& x, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    const std::optional<Dropout>& dropout, at::TensorList ys, at::Tensor& h) {
  with_kernels(x.scalar_type(), [&](auto zero, const KernelSet& set) {
    forward_in<decltype(zero)>(
        set, with_unit_columns(x), lora_As, lora_Bs, scalings, dropout, ys, h.mutable_data_ptr<float>());
  });
}

namespace {

std::vector<at::Tensor> all_with_unit_columns(at::TensorList tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& tensor : tensors) out.push_back(with_unit_columns(tensor));
  return out;
}

}  // namespace

void backward(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h, at::TensorList lora_Bs,
    at::ArrayRef<double> scalings, const std::optional<Dropout>& dropout, at::Tensor& g, at::TensorList dAs,
    at::TensorList dBs) {
  with_kernels(x.scalar_type(), [&](auto zero, const KernelSet& set) {
    using T = decltype(zero);
    backward_in<T>(
        set, all_with_unit_columns(dys), with_unit_columns(x), h.const_data_ptr<float>(), lora_Bs, scalings, dropout,
        g.mutable_data_ptr<T>(), dAs, dBs);
  });
}

void weight_gradients(
    at::TensorList dys, const at::Tensor& x, const at::Tensor& h, const at::Tensor& g, at::ArrayRef<double> scalings,
    at::TensorList dAs, at::TensorList dBs) {
  with_kernels(x.scalar_type(), [&](auto zero, const KernelSet& set) {
    weight_gradients_in<decltype(zero)>(
        set, all_with_unit_columns(dys), with_unit_columns(x), h.const_data_ptr<float>(), g.const_data_ptr<float>(),
        scalings, dAs, dBs);
  });
}

void add_input_gradient(
    const at::Tensor& g, at::TensorList lora_As, const std::optional<Dropout>& dropout, at::Tensor& dx) {
  with_kernels(g.scalar_type(), [&](auto zero, const KernelSet& set) {
    using T = decltype(zero);
    add_input_gradient_in<T>(set, g, lora_As, dropout, dx.mutable_data_ptr<T>());
  });
}

}  // namespace aletheia::low_rank
