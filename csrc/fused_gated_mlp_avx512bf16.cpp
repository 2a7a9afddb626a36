// Gated MLP, a block of rows from x to y and from dy to dx: the product act(gate) ⊙ up, dgate and dup never leave the
// cache (mathematics: aletheia_kernels/reference/gated_mlp.py).
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

  void fetch(int64_t row, int64_t column) const { fetch_to_write(up + row * width + column); }
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
  const PackedB w_gate = forward_weight(weights[0]), w_up = forward_weight(weights[1]),
                w_down = forward_weight(weights[2]);
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
  Blocks(tokens, rows_in_cache(hidden)).each([&](int64_t, bool, int64_t first, int64_t count) {
    const bf16* rows = x_data + first * ld;
    bf16* const gate_rows = gate_data + first * width;
    bf16* const up_rows = up_data + first * width;
    float* const h_rows = h_data + first * ranks;
    const Scratch<bf16> scaled(count * ranks), product(count * width);
    const Piece shrunk{rows, ld, shrink_in.panels()};
    block_product(&shrunk, 1, count, in.ranks, nullptr, store_float(h_rows, ranks));
    in.scale(h_rows, ranks, count, scaled.data());
    const Piece to_gate[]{{rows, ld, w_gate.panels()}, {scaled.data(), in.ranks, expand_gate.panels()}};
    block_product(to_gate, 2, count, width, starts[0].data(), store_bfloat16(gate_rows, width));
    const Piece to_up[]{{rows, ld, w_up.panels()}, {scaled.data() + in.offsets[1], in.ranks, expand_up.panels()}};
    bf16* const target = product.data();
    block_product(to_up, 2, count, width, starts[1].data(), IntoUpAndProduct<kActivation>{gate_rows, up_rows, target, width});
    const Piece shrunk_again{target, width, shrink_mid.panels()};
    block_product(&shrunk_again, 1, count, mid.ranks, nullptr, store_float(h_rows + in.ranks, ranks));
    mid.scale(h_rows + in.ranks, ranks, count, scaled.data());
    const Piece to_y[]{{target, width, w_down.panels()}, {scaled.data(), mid.ranks, expand_down.panels()}};
    block_product(to_y, 2, count, out, starts[2].data(), store_bfloat16(y_data + first * out, out));
  });
  return {y, gate, up, h};
}

template <Activation kActivation>
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& h,
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs, at::ArrayRef<double> scalings,
    const Mlp& mlp, bool needs_dx) {
  const auto& [in, mid, tokens, hidden, width, out, ranks] = mlp;
  const PackedB w_down = backward_weight(weights[2]), w_gate = backward_weight(weights[0]),
                w_up = backward_weight(weights[1]);
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
  blocks.each([&](int64_t run, bool starts, int64_t first, int64_t count) {
    float* const total = sums.of(run);
    const bf16* const dy_rows = dy_data + first * ldy;
    const bf16* const gate_rows = gate_data + first * width;
    const bf16* const up_rows = up_data + first * width;
    const float* const h_rows = h_data + first * ranks;
    Columns columns(std::max(in.ranks, mid.ranks));
    const Scratch<bf16> g_in(count * in.ranks), g_mid(count * mid.ranks);
    const Scratch<bf16> product(tiles ? 0 : count * width), dgate(count * width), dup(count * width);
    bf16* const dgate_data = dgate.data();
    bf16* const dup_data = dup.data();

    mid.project(0, dy_rows, ldy, count, shrink_down, g_mid.data());
    columns.product(!starts, h_rows + in.ranks, ranks, mid.ranks, dy_rows, ldy, count, out, total + dB_down);
    const Piece to_product[]{{dy_rows, ldy, w_down.panels()}, {g_mid.data(), mid.ranks, spread_mid.panels()}};
    const ArrivingColumns into_dA_down(!starts, g_mid.data(), mid.ranks, tiles ? mid.ranks : 0, count, total + dA_mid);
    const ArrivingColumns into_dB_gate(!starts, h_rows, ranks, tiles ? in.rank(0) : 0, count, total + dB_gate);
    const ArrivingColumns into_dB_up(
        !starts, h_rows + in.offsets[1], ranks, tiles ? in.rank(1) : 0, count, total + dB_up);
    Errands for_dA, for_next;
    if (in.ranks > 0) for_dA.add({x_data + first * ld, ld, count, hidden});
    if (const int64_t after = blocks.rows_after(first)) for_next.add({dy_rows + count * ldy, ldy, after, out});
    block_product(
        to_product, 2, count, width, nullptr,
        IntoProductGateAndUp<kActivation>{
            gate_rows, up_rows, product.data(), dgate_data, dup_data, width, std::max<int64_t>(count, 3),
            &into_dA_down, &into_dB_gate, &into_dB_up},
        &for_dA);
    in.project(0, dgate_data, width, count, shrink_gate, g_in.data());
    in.project(1, dup_data, width, count, shrink_up, g_in.data());
    if (!tiles) {
      columns.product(!starts, g_mid.data(), mid.ranks, mid.ranks, product.data(), width, count, width, total + dA_mid);
      columns.product(!starts, h_rows, ranks, in.rank(0), dgate_data, width, count, width, total + dB_gate);
      columns.product(!starts, h_rows + in.offsets[1], ranks, in.rank(1), dup_data, width, count, width, total + dB_up);
    }
    columns.product(!starts, g_in.data(), in.ranks, in.ranks, x_data + first * ld, ld, count, hidden, total);
    if (!needs_dx) return;
    const Piece to_dx[]{
        {dgate_data, width, w_gate.panels()},
        {dup_data, width, w_up.panels()},
        {g_in.data(), in.ranks, spread_in.panels()}};
    block_product(to_dx, 3, count, hidden, nullptr, store_bfloat16(dx_data + first * hidden, hidden), &for_next);
  });
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
