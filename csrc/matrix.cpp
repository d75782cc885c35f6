#include "matrix.hpp"

#include <cmath>
#include <cstring>

namespace localmoe {
namespace {

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
    float value;
    if (rest >= 0x7C00) {
        const uint32_t bits = sign | 0x7F800000 | (rest & 0x3FF) << 13;
        std::memcpy(&value, &bits, 4);
    } else {
        // Multiplying shifts the exponent and makes subnormals normal, exactly.
        const uint32_t bits = rest << 13;
        std::memcpy(&value, &bits, 4);
        value = sign ? -value * 0x1p112f : value * 0x1p112f;
    }
    return value;
}

float e8m0_to_float(uint8_t code) { return std::ldexp(1.0f, code - 127); }

float e4m3_to_float(uint8_t code) { return half_to_float(static_cast<uint16_t>(code << 7)) * 256.0f; }

float bf16_to_float(uint16_t code) {
    const uint32_t bits = static_cast<uint32_t>(code) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T>
T load(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

}  // namespace

void read_row(const Matrix& m, size_t row, float* out) {
    constexpr float kE2m1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    const size_t r = row % kRowGroup;
    const uint8_t* values = m.values + row / kRowGroup * m.group_values_bytes();
    const uint8_t* scales = m.scales + row / kRowGroup * m.group_scales_bytes();
    for (size_t c = 0; c < m.columns; ++c) {
        switch (m.format) {
            case Format::kMxfp4:
            case Format::kNvfp4: {
                const uint8_t byte = values[c / 32 * 256 + c % 32 / 8 * 64 + r * 4 + c % 4];
                const float value = kE2m1[c % 8 < 4 ? byte & 15 : byte >> 4];
                out[c] = m.format == Format::kMxfp4
                             ? value * e8m0_to_float(scales[c / 32 * 16 + r])
                             : value * e4m3_to_float(scales[c / 16 * 16 + r]) * m.tensor_scale;
                break;
            }
            case Format::kInt8:
                out[c] = static_cast<float>(values[c / 4 * 64 + r * 4 + c % 4] - 128) *
                         half_to_float(load<uint16_t>(scales + (c / 32 * 16 + r) * 2));
                break;
            case Format::kBf16:
                out[c] = bf16_to_float(load<uint16_t>(values + (c / 2 * 32 + r * 2 + c % 2) * 2));
                break;
            default:
                out[c] = load<float>(values + (c * 16 + r) * 4);
        }
    }
}

}  // namespace localmoe
