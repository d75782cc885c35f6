// Tiles in plain C++, so that what is built on them can be tested on machines without AMX. Never in a release.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct EmulatedTiles {
    uint8_t config[64];
    uint8_t rows[8][16][64];
    int row_bytes(int tile) const {
        uint16_t bytes;
        std::memcpy(&bytes, config + 16 + 2 * tile, 2);
        return bytes;
    }
    int num_rows(int tile) const { return config[48 + tile]; }
};

inline EmulatedTiles& tiles() {
    static thread_local EmulatedTiles state;
    return state;
}

inline void emulated_load(int tile, const void* base, size_t stride) {
    for (int r = 0; r < tiles().num_rows(tile); ++r) {
        std::memcpy(tiles().rows[tile][r], static_cast<const uint8_t*>(base) + r * stride,
                    static_cast<size_t>(tiles().row_bytes(tile)));
    }
}

inline void emulated_store(int tile, void* base, size_t stride) {
    for (int r = 0; r < tiles().num_rows(tile); ++r) {
        std::memcpy(static_cast<uint8_t*>(base) + r * stride, tiles().rows[tile][r],
                    static_cast<size_t>(tiles().row_bytes(tile)));
    }
}

// Signed a times unsigned b (Intel's architecture manual, TDPBSUD).
inline void emulated_dpbsud(int c, int a, int b) {
    auto& state = tiles();
    for (int m = 0; m < state.num_rows(c); ++m) {
        for (int n = 0; n < state.row_bytes(c) / 4; ++n) {
            int32_t sum;
            std::memcpy(&sum, state.rows[c][m] + 4 * n, 4);
            for (int k = 0; k < state.row_bytes(a); ++k) {
                sum += static_cast<int8_t>(state.rows[a][m][k]) * state.rows[b][k / 4][4 * n + k % 4];
            }
            std::memcpy(state.rows[c][m] + 4 * n, &sum, 4);
        }
    }
}

}  // namespace

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_loadconfig
#undef _tile_release
#define _tile_zero(tile) std::memset(tiles().rows[tile], 0, sizeof tiles().rows[tile])
#define _tile_loadd(tile, base, stride) emulated_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_store(tile, base, stride)
#define _tile_dpbsud(c, a, b) emulated_dpbsud(c, a, b)
#define _tile_loadconfig(bytes) std::memcpy(tiles().config, bytes, 64)
#define _tile_release() static_cast<void>(0)
