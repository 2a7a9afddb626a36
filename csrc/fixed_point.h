// Products of bfloat16 matrices in 16-bit fixed point, on processors with AVX512-VNNI and without AVX512-BF16: vpdpwssd
// does there in one instruction what two of float32 do, and the vendor library has nothing quicker than float32.
//
// The inner index is cut into groups of 128. Within a group, a row on the left and a column on the right each get a power
// of two that makes their largest magnitude less than 2^12, are rounded to whole numbers, and their 128 products, each
// less than 2^24, are summed exactly in 32 bits; groups are summed in float32. Elements within 2^4 of the largest of
// their group keep all eight bits of a bfloat16; of smaller ones is lost what is less than 2^-13 of the largest, which a
// sum rounded to bfloat16 is 2^-9 off by anyway. A row or column with an element that is not finite gives NaN.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

namespace aletheia::fixed_point {

// Whether the instruction set in use multiplies matrices of this dtype with so many rows on the left by what is below.
bool serves(at::ScalarType dtype, int64_t rows);

// A left factor [rows, inner], rounded: once, whatever it is multiplied by.
class Left;
std::shared_ptr<const Left> rounded(const at::Tensor& left);

// One result: Σ_i lefts_i rights_i + bias, rights [inner_i, columns] in any strides, out [rows, columns] with unit
// columns and in bfloat16 or float32.
struct Sum {
  std::vector<std::shared_ptr<const Left>> lefts;
  std::vector<at::Tensor> rights;
  std::optional<at::Tensor> bias;
  at::Tensor out;
};

// All of them, with equally many rows.
void multiply(const std::vector<Sum>& sums);

}  // namespace aletheia::fixed_point
