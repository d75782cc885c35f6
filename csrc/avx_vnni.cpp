#define LOCALMOE_AVX_VNNI
#include "simd_avx2.hpp"
#include "table.hpp"

const localmoe::Kernels* localmoe::avx_vnni_kernels() {
    static constexpr Kernels kernels = table<Avx2>("avx_vnni");
    return &kernels;
}
