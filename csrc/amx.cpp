// AMX: AVX-512 with VNNI, and tiles where tokens are many.
//
// A tile product is exact in integers over a block of 32 columns; scales and sums are those of the other levels,
// so a token's results are the same bits with tiles and without.
#include "simd_avx512.hpp"
#include "table.hpp"

#ifdef LOCALMOE_EMULATE_AMX
#include "amx_emulation.hpp"
#endif

namespace {

struct Amx : Avx512 {
    static constexpr int kTokens = 16;     // rows of a tile
    static constexpr int kTileTokens = 5;  // fewer do not pay for storing and loading the sums

    // dots[t * 16 + row] = sum over 4 * words columns of int8 inputs (rows of `input_stride` bytes) times uint8
    // weights.
    template <int words>
    static void multiply(const int32_t* inputs, size_t input_stride, const uint8_t* weights, int32_t* dots) {
        // Loads and stores of tiles are not seen as reads and writes of memory.
        asm volatile("" ::: "memory");
        _tile_zero(0);
        // Tile numbers become part of an instruction's text, so they are spelled out.
        if constexpr (words == 8) {
            _tile_loadd(1, inputs, input_stride);
            _tile_loadd(2, weights, 64);
            _tile_dpbsud(0, 1, 2);
        } else {
            _tile_loadd(3, inputs, input_stride);
            _tile_loadd(4, weights, 64);
            _tile_dpbsud(0, 3, 4);
        }
        _tile_stored(0, dots, 64);
        asm volatile("" ::: "memory");
    }
};

// Tiles 1 and 2 take 32 columns, 3 and 4 take 16 (NVFP4's blocks); 0 is the sums. Constant, because GCC 12 does
// not see that the instruction reads all of it, and would leave out stores to it.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 32, 64, 16, 64};
    uint8_t rows[16] = {16, 16, 8, 16, 4};
};
constexpr TileConfig kConfig;

class TileScope {
public:
    TileScope() { _tile_loadconfig(&kConfig); }
    // Tiles in use make every switch of the thread dear.
    ~TileScope() { _tile_release(); }
};

void tiled_product(const Matrix& matrix, size_t first_group, size_t last_group, const Tokens& tokens,
                   Output output, uint8_t* scratch) {
    const TileScope scope;
    product<Amx>(matrix, first_group, last_group, tokens, output, scratch);
}

void tiled_gate_up(const Matrix& gate, const Matrix& up, size_t first_group, size_t last_group,
                   const Tokens& tokens, Output output, uint8_t* scratch) {
    const TileScope scope;
    gate_up<Amx>(gate, up, first_group, last_group, tokens, output, scratch);
}

constexpr localmoe::Kernels amx_table() {
    auto kernels = table<Amx>("amx");
    kernels.product = tiled_product;
    kernels.gate_up = tiled_gate_up;
    return kernels;
}

}  // namespace

const localmoe::Kernels* localmoe::amx_kernels() {
    static constexpr Kernels kernels = amx_table();
    return &kernels;
}
