#include "simd_avx512.hpp"
#include "table.hpp"

const localmoe::Kernels* localmoe::avx512_vnni_kernels() {
    static constexpr Kernels kernels = table<Avx512>("avx512_vnni");
    return &kernels;
}
