// Gated MLP, a block of rows from x to y and from dy to dx: the product act(gate) ⊙ up, dgate and dup never leave the
// cache; or, where the weights are wide, all rows a stage at a time (mathematics: aletheia_kernels/reference/gated_mlp.py).
#include <ATen/ops/empty.h>

#include "fused_avx512bf16.h"

#ifdef ALETHEIA_AVX512BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace aletheia::fused {
namespace {

struct Activated {
  __m512 value, slope;
};

// silu(v) = v σ(v), slope σ + v σ (1 - σ). gelu_tanh(v) = v σ(2u), u = √(2/π) (v + 0.044715 v³), since
// (1 + tanh u) / 2 = σ(2u); slope σ + v σ (1 - σ) 2u'.
template <Activation kActivation>
inline Activated activate(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 argument = v, inner_slope = one;
  if constexpr (kActivation == Activation::kGeluTanh) {
    const __m512 c = _mm512_set1_ps(1.59576912f), square = _mm512_mul_ps(v, v);  // 2 √(2/π)
    argument = _mm512_mul_ps(_mm512_mul_ps(c, v), _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), one));
    inner_slope = _mm512_mul_ps(c, _mm512_fmadd_ps(square, _mm512_set1_ps(3 * 0.044715f), one));
  }
  // Clamped where σ is 0 or 1 to float's last bit, so that nothing overflows on the way there.
  const __m512 bounded = _mm512_min_ps(_mm512_max_ps(argument, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(87.0f));
  const __m512 sigma =
      _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), bounded))));
  const __m512 value = _mm512_mul_ps(v, sigma);
  const __m512 rest = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_sub_ps(one, sigma)), inner_slope);
  return {value, _mm512_add_ps(sigma, rest)};
}

inline __m512 load(const bf16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }
inline void store(bf16* p, __mmask16 mask, __m512 value) { _mm256_mask_storeu_epi16(p, mask, narrow(value)); }

inline __m512 low_half(__m512i both) { return widen(_mm512_castsi512_si256(both)); }
inline __m512 high_half(__m512i both) { return widen(_mm512_extracti64x4_epi64(both, 1)); }

// What follows a sum of up: up itself, and its product with the activated gate.
template <Activation kActivation>
struct IntoUpAndProduct {
  const bf16* gate;  // of the block, as all here
  bf16 *up, *product;
  int64_t width;

  void fetch(int64_t row, int64_t column) const {
    _mm_prefetch(gate + row * width + column, _MM_HINT_T0);
    fetch_to_write(up + row * width + column);
  }
  __attribute__((always_inline)) void operator()(int64_t row, int64_t column, int64_t count, const float* sums) const {
    for (int64_t k = 0; k < count; k += kLanes) {
      const int64_t at = row * width + column + k;
      const __mmask16 mask = first_lanes(count - k);
      const __m512 sum = _mm512_load_ps(sums + k);
      store(up + at, mask, sum);
      const __m512 active = activate<kActivation>(load(gate + at, mask)).value;
      store(product + at, mask, _mm512_mul_ps(active, widen(narrow(sum))));
    }
  }
};

// What follows a sum of dproduct: product, dgate and dup of the element. Vector registers leave all three in memory. Tile
// registers leave dgate and dup there, and sum what the adapters' gradients take from the three over their tokens while
// 32 columns of them are in first-level cache.
template <Activation kActivation>
struct IntoProductGateAndUp {
  const bf16 *gate, *up;  // of the block, as all here
  bf16 *product, *dgate, *dup;
  int64_t width, tokens;
  const ArrivingColumns *dA_down, *dB_gate, *dB_up;

  void fetch(int64_t row, int64_t column) const {
    _mm_prefetch(gate + row * width + column, _MM_HINT_T0);
    _mm_prefetch(up + row * width + column, _MM_HINT_T0);
    const ArrivingColumns* const each[]{dA_down, dB_gate, dB_up};
    each[row % 3]->fetch(column, row / 3, tokens / 3);
  }
  __attribute__((always_inline)) void operator()(int64_t row, int64_t column, int64_t count, const float* sums) const {
    for (int64_t k = 0; k < count; k += kLanes) {
      const int64_t at = row * width + column + k;
      const __mmask16 mask = first_lanes(count - k);
      const Gradients given = gradients(_mm512_load_ps(sums + k), load(gate + at, mask), load(up + at, mask));
      store(product + at, mask, given.product);
      store(dgate + at, mask, given.dgate);
      store(dup + at, mask, given.dup);
    }
  }
  // Rows past the last are zeros.
  __attribute__((always_inline)) void two_rows(
      int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums, int64_t stride) const {
    const __mmask32 mask = first_pairs_of_lanes(count);
    const Row even = one_row(row, column, mask, sums);
    const Row odd = rows > 1 ? one_row(row + 1, column, mask, sums + stride) : Row{};
    if (dA_down->wanted()) dA_down->put(row, even.product, odd.product);
    if (dB_gate->wanted()) dB_gate->put(row, even.dgate, odd.dgate);
    if (dB_up->wanted()) dB_up->put(row, even.dup, odd.dup);
  }
  void columns_done(TileStrips& strips, int64_t column, int64_t) const {
    for (const ArrivingColumns* arriving : {dA_down, dB_gate, dB_up}) arriving->multiply(strips, column);
  }

 private:
  struct Gradients {
    __m512 product, dgate, dup;
  };
  struct Row {
    __m512i product = _mm512_setzero_si512(), dgate = _mm512_setzero_si512(), dup = _mm512_setzero_si512();
  };
  static __attribute__((always_inline)) Gradients gradients(__m512 sum, __m512 gate, __m512 up) {
    const Activated active = activate<kActivation>(gate);
    return {
        _mm512_mul_ps(active.value, up), _mm512_mul_ps(_mm512_mul_ps(sum, up), active.slope),
        _mm512_mul_ps(sum, active.value)};
  }
  __attribute__((always_inline)) Row one_row(int64_t row, int64_t column, __mmask32 mask, const float* sums) const {
    const int64_t at = row * width + column;
    const __m512i gates = _mm512_maskz_loadu_epi16(mask, gate + at), ups = _mm512_maskz_loadu_epi16(mask, up + at);
    const Gradients first = gradients(_mm512_load_ps(sums), low_half(gates), low_half(ups));
    const Gradients second = gradients(_mm512_load_ps(sums + kLanes), high_half(gates), high_half(ups));
    const Row given{
        (__m512i)_mm512_cvtne2ps_pbh(second.product, first.product),
        (__m512i)_mm512_cvtne2ps_pbh(second.dgate, first.dgate), (__m512i)_mm512_cvtne2ps_pbh(second.dup, first.dup)};
    _mm512_mask_storeu_epi16(dgate + at, mask, given.dgate);
    _mm512_mask_storeu_epi16(dup + at, mask, given.dup);
    return given;
  }
};

struct Mlp {
  Adapters in, mid;
  int64_t tokens, hidden, width, out, ranks;

  Mlp(const at::Tensor& x, at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs,
      at::ArrayRef<double> scalings)
      : in(lora_As.slice(0, 2), lora_Bs.slice(0, 2), scalings.slice(0, 2)),
        mid(lora_As.slice(2), lora_Bs.slice(2), scalings.slice(2)), tokens(x.size(0)), hidden(x.size(1)),
        width(weights[0].size(0)), out(weights[2].size(0)), ranks(in.ranks + mid.ranks) {}
};

template <Activation kActivation>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, const Mlp& mlp) {
  const auto& [in, mid, tokens, hidden, width, out, ranks] = mlp;
  const When when = when_to_pack(tokens, weights);
  const PackedB w_gate = forward_weight(weights[0], when), w_up = forward_weight(weights[1], when),
                w_down = forward_weight(weights[2], when);
  const PackedB shrink_in = in.stacked_A(Packing::kColumns), shrink_mid = mid.stacked_A(Packing::kColumns);
  const PackedB expand_gate = in.B(0, Packing::kColumns), expand_up = in.B(1, Packing::kColumns),
                expand_down = mid.B(0, Packing::kColumns);
  pack_all({&w_gate, &w_up, &w_down, &shrink_in, &shrink_mid, &expand_gate, &expand_up, &expand_down});
  const Scratch<float> starts[]{
      padded_bias(biases.get(0), width), padded_bias(biases.get(1), width), padded_bias(biases.get(2), out)};

  at::Tensor y = at::empty({tokens, out}, x.options());
  at::Tensor gate = at::empty({tokens, width}, x.options()), up = at::empty({tokens, width}, x.options());
  at::Tensor h = at::empty({tokens, ranks}, x.options().dtype(at::kFloat));
  const bf16* const x_data = x.const_data_ptr<bf16>();
  bf16* const y_data = y.mutable_data_ptr<bf16>();
  bf16* const gate_data = gate.mutable_data_ptr<bf16>();
  bf16* const up_data = up.mutable_data_ptr<bf16>();
  float* const h_data = h.mutable_data_ptr<float>();
  const int64_t ld = x.stride(0);
  // Of the rows from `first` on; scaled and product hold no others.
  const auto to_h_in = [&](int64_t first, int64_t count, bf16* scaled) {
    const Piece shrunk{x_data + first * ld, ld, shrink_in.panels()};
    block_product(&shrunk, 1, count, in.ranks, nullptr, store_float(h_data + first * ranks, ranks));
    in.scale(h_data + first * ranks, ranks, count, scaled);
  };
  const auto to_product = [&](int64_t first, int64_t count, const bf16* scaled, bf16* product, Window& window) {
    const bf16* const rows = x_data + first * ld;
    const int64_t at = first * width + window.first;
    bf16* const gate_rows = gate_data + at;
    const Piece to_gate[]{{rows, ld, w_gate.panels(window)}, {scaled, in.ranks, expand_gate.panels(window)}};
    block_product(
        to_gate, 2, count, window.count, from(starts[0], window.first), store_bfloat16(gate_rows, width));
    const Piece to_up[]{
        {rows, ld, w_up.panels(window)}, {scaled + in.offsets[1], in.ranks, expand_up.panels(window)}};
    block_product(
        to_up, 2, count, window.count, from(starts[1], window.first),
        IntoUpAndProduct<kActivation>{gate_rows, up_data + at, product + window.first, width});
  };
  const auto to_h_mid = [&](int64_t first, int64_t count, const bf16* product, bf16* scaled) {
    float* const h_rows = h_data + first * ranks + in.ranks;
    const Piece shrunk{product, width, shrink_mid.panels()};
    block_product(&shrunk, 1, count, mid.ranks, nullptr, store_float(h_rows, ranks));
    mid.scale(h_rows, ranks, count, scaled);
  };
  const auto to_y = [&](int64_t first, int64_t count, const bf16* product, const bf16* scaled, Window& window) {
    const Piece pieces[]{{product, width, w_down.panels(window)}, {scaled, mid.ranks, expand_down.panels(window)}};
    block_product(
        pieces, 2, count, window.count, from(starts[2], window.first),
        store_bfloat16(y_data + first * out + window.first, out));
  };
  const Blocks blocks(tokens, rows_in_cache(hidden));
  if (when == When::kBefore) {
    blocks.each([&](int64_t, bool, int64_t first, int64_t count) {
      const Scratch<bf16> scaled(count * ranks), product(count * width);
      Window of_width(width), of_out(out);
      to_h_in(first, count, scaled.data());
      to_product(first, count, scaled.data(), product.data(), of_width);
      to_h_mid(first, count, product.data(), scaled.data());
      to_y(first, count, product.data(), scaled.data(), of_out);
    });
  } else {
    const Scratch<bf16> scaled_in(tokens * in.ranks), scaled_mid(tokens * mid.ranks), product(tokens * width);
    blocks.each([&](int64_t, bool, int64_t first, int64_t count) {
      to_h_in(first, count, scaled_in.data() + first * in.ranks);
    });
    each_window(width, w_gate.unit_elements() + w_up.unit_elements(), [&](Window& window) {
      to_product(0, tokens, scaled_in.data(), product.data(), window);
    });
    blocks.each([&](int64_t, bool, int64_t first, int64_t count) {
      to_h_mid(first, count, product.data() + first * width, scaled_mid.data() + first * mid.ranks);
    });
    each_window(out, w_down.unit_elements(), [&](Window& window) {
      to_y(0, tokens, product.data(), scaled_mid.data(), window);
    });
  }
  return {y, gate, up, h};
}

template <Activation kActivation>
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& h,
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    const Mlp& mlp, bool needs_dx) {
  const auto& [in, mid, tokens, hidden, width, out, ranks] = mlp;
  const When when = when_to_pack(tokens, weights);
  const PackedB w_down = backward_weight(weights[2], when), w_gate = backward_weight(weights[0], when),
                w_up = backward_weight(weights[1], when);
  const PackedB spread_in = in.stacked_A(Packing::kRows), spread_mid = mid.stacked_A(Packing::kRows);
  const PackedB shrink_gate = in.B(0, Packing::kRows), shrink_up = in.B(1, Packing::kRows),
                shrink_down = mid.B(0, Packing::kRows);
  std::vector<const PackedB*> jobs{&w_down, &spread_mid, &shrink_gate, &shrink_up, &shrink_down};
  if (needs_dx) jobs.insert(jobs.end(), {&w_gate, &w_up, &spread_in});
  pack_all(jobs);

  at::Tensor dx = needs_dx ? at::empty({tokens, hidden}, x.options()) : at::empty({0}, x.options());
  bf16* const dx_data = dx.mutable_data_ptr<bf16>();
  const bf16* const dy_data = dy.const_data_ptr<bf16>();
  const bf16* const x_data = x.const_data_ptr<bf16>();
  const bf16* const gate_data = gate.const_data_ptr<bf16>();
  const bf16* const up_data = up.const_data_ptr<bf16>();
  const float* const h_data = h.const_data_ptr<float>();
  const int64_t ld = x.stride(0), ldy = dy.stride(0);
  // Where each gradient's sum starts: dA of gate and up, dA of down, then the three dBᵀ.
  const int64_t dA_mid = TokenSums::size(in.ranks, hidden), dB_gate = dA_mid + TokenSums::size(mid.ranks, width),
                dB_up = dB_gate + TokenSums::size(in.rank(0), width), dB_down = dB_up + TokenSums::size(in.rank(1), width);
  // Matrices of the MLP's width beside the sums: half the rows leave room for them in second-level cache.
  const bool tiles = tile_registers_in_use();
  const Blocks blocks(tokens, tiles ? rows_in_cache(hidden) / 2 : 256);
  TokenSums sums(blocks.runs, dB_down + TokenSums::size(mid.ranks, out));
  // What lies between dy and dx, of the rows that a stage is given.
  struct Between {
    Scratch<bf16> g_in, g_mid, product, dgate, dup;
    Between(const Mlp& mlp, int64_t rows, bool keeps_product)
        : g_in(rows * mlp.in.ranks), g_mid(rows * mlp.mid.ranks), product(keeps_product ? rows * mlp.width : 0),
          dgate(rows * mlp.width), dup(rows * mlp.width) {}
  };
  // Rows from `first` on, which in `between` are those from `at` on.
  const auto to_g_mid = [&](float* total, bool starts, int64_t first, int64_t count, const Between& between, int64_t at) {
    const bf16* const dy_rows = dy_data + first * ldy;
    Columns columns(mid.ranks);
    mid.project(0, dy_rows, ldy, count, shrink_down, between.g_mid.data() + at * mid.ranks);
    columns.product(
        !starts, h_data + first * ranks + in.ranks, ranks, mid.ranks, dy_rows, ldy, count, out, total + dB_down);
  };
  const auto to_dgate_and_dup = [&](
      float* total, bool starts, int64_t first, int64_t count, const Between& between, Window& window, Errands* near) {
    const float* const h_rows = h_data + first * ranks;
    const Piece pieces[]{
        {dy_data + first * ldy, ldy, w_down.panels(window)},
        {between.g_mid.data(), mid.ranks, spread_mid.panels(window)}};
    const ArrivingColumns into_dA_down(
        !starts, between.g_mid.data(), mid.ranks, tiles ? mid.ranks : 0, count, total + dA_mid);
    const ArrivingColumns into_dB_gate(!starts, h_rows, ranks, tiles ? in.rank(0) : 0, count, total + dB_gate);
    const ArrivingColumns into_dB_up(
        !starts, h_rows + in.offsets[1], ranks, tiles ? in.rank(1) : 0, count, total + dB_up);
    const int64_t rows = first * width + window.first;
    block_product(
        pieces, 2, count, window.count, nullptr,
        IntoProductGateAndUp<kActivation>{
            gate_data + rows, up_data + rows, between.product.data() + window.first,
            between.dgate.data() + window.first, between.dup.data() + window.first, width,
            std::max<int64_t>(count, 3), &into_dA_down, &into_dB_gate, &into_dB_up},
        near);
  };
  const auto to_g_in = [&](float* total, bool starts, int64_t first, int64_t count, const Between& between, int64_t at) {
    const bf16* const dgate = between.dgate.data() + at * width;
    const bf16* const dup = between.dup.data() + at * width;
    bf16* const g_in = between.g_in.data() + at * in.ranks;
    const float* const h_rows = h_data + first * ranks;
    Columns columns(std::max(in.ranks, mid.ranks));
    in.project(0, dgate, width, count, shrink_gate, g_in);
    in.project(1, dup, width, count, shrink_up, g_in);
    if (!tiles) {
      columns.product(
          !starts, between.g_mid.data() + at * mid.ranks, mid.ranks, mid.ranks, between.product.data() + at * width,
          width, count, width, total + dA_mid);
      columns.product(!starts, h_rows, ranks, in.rank(0), dgate, width, count, width, total + dB_gate);
      columns.product(!starts, h_rows + in.offsets[1], ranks, in.rank(1), dup, width, count, width, total + dB_up);
    }
    columns.product(!starts, g_in, in.ranks, in.ranks, x_data + first * ld, ld, count, hidden, total);
  };
  const auto to_dx = [&](int64_t first, int64_t count, const Between& between, Window& window, Errands* near) {
    const Piece pieces[]{
        {between.dgate.data(), width, w_gate.panels(window)},
        {between.dup.data(), width, w_up.panels(window)},
        {between.g_in.data(), in.ranks, spread_in.panels(window)}};
    bf16* const target = dx_data + first * hidden + window.first;
    block_product(pieces, 3, count, window.count, nullptr, store_bfloat16(target, hidden), near);
  };
  if (when == When::kBefore) {
    blocks.each([&](int64_t run, bool starts, int64_t first, int64_t count) {
      float* const total = sums.of(run);
      const Between between(mlp, count, !tiles);
      Errands for_dA, for_next;
      if (in.ranks > 0) for_dA.add({x_data + first * ld, ld, count, hidden});
      if (const int64_t after = blocks.rows_after(first))
        for_next.add({dy_data + (first + count) * ldy, ldy, after, out});
      Window of_width(width), of_hidden(hidden);
      to_g_mid(total, starts, first, count, between, 0);
      to_dgate_and_dup(total, starts, first, count, between, of_width, &for_dA);
      to_g_in(total, starts, first, count, between, 0);
      if (needs_dx) to_dx(first, count, between, of_hidden, &for_next);
    });
  } else {
    const Between between(mlp, tokens, true);
    blocks.each([&](int64_t run, bool starts, int64_t first, int64_t count) {
      to_g_mid(sums.of(run), starts, first, count, between, first);
    });
    each_window(width, w_down.unit_elements(), [&](Window& window) {
      to_dgate_and_dup(sums.of(0), true, 0, tokens, between, window, nullptr);
    });
    blocks.each([&](int64_t run, bool starts, int64_t first, int64_t count) {
      to_g_in(sums.of(run), starts, first, count, between, first);
    });
    if (needs_dx)
      each_window(hidden, w_gate.unit_elements() + w_up.unit_elements(), [&](Window& window) {
        to_dx(0, tokens, between, window, nullptr);
      });
  }
  std::vector<at::Tensor> dAs, dBs;
  const int64_t dB_offsets[]{dB_gate, dB_up, dB_down};
  for (size_t i = 0; i < 3; ++i) {
    const bool down = i == 2;
    sums.want(
        down ? dA_mid : 0, down ? mid.ranks : in.ranks, down ? 0 : in.offsets[i], false, 1.0, lora_As[i], dAs);
    sums.want(dB_offsets[i], lora_As[i].size(0), 0, true, scalings[i], lora_Bs[i], dBs);
  }
  sums.write();
  to_dtype_of(lora_As, dAs);
  to_dtype_of(lora_Bs, dBs);
  return {dx, std::move(dAs), std::move(dBs)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_gated_mlp_forward(
    const at::Tensor& x_any, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, at::ArrayRef<double> scalings, Activation activation) {
  const at::Tensor x = with_unit_columns(x_any);
  const Mlp mlp(x, weights, lora_As, lora_Bs, scalings);
  return activation == Activation::kSilu ? forward<Activation::kSilu>(x, weights, biases, mlp)
                                         : forward<Activation::kGeluTanh>(x, weights, biases, mlp);
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_gated_mlp_backward(
    const at::Tensor& dy_any, const at::Tensor& x_any, const at::Tensor& gate, const at::Tensor& up,
    const at::Tensor& h, at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs,
    at::ArrayRef<double> scalings, Activation activation, bool needs_dx) {
  const at::Tensor x = with_unit_columns(x_any), dy = with_unit_columns(dy_any);
  const Mlp mlp(x, weights, lora_As, lora_Bs, scalings);
  const auto run = activation == Activation::kSilu ? backward<Activation::kSilu> : backward<Activation::kGeluTanh>;
  return run(dy, x, gate, up, h, weights, lora_As, lora_Bs, scalings, mlp, needs_dx);
}

}  // namespace aletheia::fused

#pragma GCC pop_options

#else

namespace aletheia::fused {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_gated_mlp_forward(
    const at::Tensor&, at::TensorList, const OptionalTensors&, at::TensorList, at::TensorList, at::ArrayRef<double>,
    Activation) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> lora_gated_mlp_backward(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, at::TensorList,
    at::TensorList, at::TensorList, at::ArrayRef<double>, Activation, bool) {
  TORCH_CHECK(false, "built without AVX512-BF16");
}

}  // namespace aletheia::fused

#endif
