// Tile registers (AMX-BF16): eight of up to 16 rows × 64 bytes. One instruction adds the product of a tile of 16 × 32
// bfloat16 and one of 32 × 16, whose rows lie in pairs as block_product.h's panels do, to 16 × 16 float32 sums.
//
// The instructions are written out: GCC 12's own macros for them do not tell the compiler that they read memory.
// Only for translation units that check the processor first, through instruction_set().
#pragma once

#include "bf16_products.h"

#ifdef ALETHEIA_AVX512BF16

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

namespace aletheia {
namespace {

constexpr int64_t kTileRows = 16;   // of sums and of the left factor
constexpr int64_t kTileInner = 32;  // inner indices of one product

template <int kTile>
inline __attribute__((always_inline)) void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline __attribute__((always_inline)) void tile_load(const void* data, int64_t stride_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(data), "r"(stride_bytes) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void tile_store(void* data, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(data), "r"(stride_bytes) : "memory");
}
template <int kSum, int kLeft, int kRight>
inline __attribute__((always_inline)) void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

// The tile registers of this thread while it lives, for strips of up to 32 rows of sums in bands of 16: sums in registers
// 0 and 1 (first band) and 2 and 3 (second), left factors in 4 and 5, right ones in 6 and 7.
class TileRegisters {
 public:
  ~TileRegisters() { asm volatile("tilerelease"); }

  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    const uint8_t first = static_cast<uint8_t>(std::min(rows, kTileRows));
    const uint8_t second = static_cast<uint8_t>(std::max<int64_t>(rows - kTileRows, 1));
    const uint8_t heights[8] = {first, first, second, second, first, second, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = 64;
      shape.rows[tile] = heights[tile];
    }
    asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }

 private:
  int64_t rows_ = 0;
};

}  // namespace
}  // namespace aletheia

#pragma GCC pop_options

#endif
