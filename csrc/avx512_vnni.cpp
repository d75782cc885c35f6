#include "simd_avx512.hpp"
// The level's arithmetic comes first.
#include "table.hpp"

const localmoe::Kernels* localmoe::avx512_vnni_kernels() {
    static constexpr Kernels kernels = table<Avx512>("avx512_vnni");
    return &kernels;
}
