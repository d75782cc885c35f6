#include "simd_avx2.hpp"
#include "table.hpp"

const localmoe::Kernels* localmoe::avx2_kernels() {
    static constexpr Kernels kernels = table<Avx2>("avx2");
    return &kernels;
}
