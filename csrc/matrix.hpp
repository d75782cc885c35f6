// Weights as the store lays them out, "interleaved-16": sixteen rows (outputs) side by side, so that a vector lane
// is a row and no product needs a sum across lanes. One layout for the file, RAM and every instruction level.
//
//   format  values, per group of 16 rows                  scales, per group of 16 rows
//   mxfp4   [C/32][4][16][4] bytes, two columns each      [C/32][16] E8M0
//   nvfp4   the same                                      [C/16][16] E4M3, and one float for the matrix
//   int8    [C/4][16][4] bytes, value + 128               [C/32][16] float16
//   bf16    [ceil(C/2)][16][2] bfloat16                   none
//   f32     [C][16] float                                 none
//
// FP4: byte i of row r in chunk j of a block of 32 columns holds column 8j + i in its low nibble and column
// 8j + 4 + i in its high one, so that a mask and a shift leave four neighbouring columns in each 32-bit lane.
#pragma once

#include <cstddef>
#include <cstdint>

namespace localmoe {

enum class Format : uint8_t { kMxfp4, kNvfp4, kInt8, kBf16, kF32 };

inline constexpr size_t kRowGroup = 16;
inline constexpr size_t kBlock = 32;  // columns that share an activation scale

inline constexpr bool is_quantized(Format format) { return format < Format::kBf16; }

struct Matrix {
    Format format;
    size_t rows;
    size_t columns;
    const uint8_t* values;
    const uint8_t* scales;
    float tensor_scale;

    size_t num_groups() const { return (rows + kRowGroup - 1) / kRowGroup; }

    size_t group_values_bytes() const {
        switch (format) {
            case Format::kMxfp4:
            case Format::kNvfp4:
                return columns * 8;
            case Format::kInt8:
                return columns * 16;
            case Format::kBf16:
                return (columns + 1) / 2 * 64;
            default:
                return columns * 64;
        }
    }

    size_t group_scales_bytes() const {
        switch (format) {
            case Format::kMxfp4:
                return columns / 2;
            case Format::kNvfp4:
            case Format::kInt8:
                return columns;
            default:
                return 0;
        }
    }
};

// One row as floats, one element at a time: for embeddings, and to hold products against.
void read_row(const Matrix& matrix, size_t row, float* out);

}  // namespace localmoe
