// What an instruction level computes: a table of functions, one table per level, chosen once at start.
//
// A level's functions are single-threaded and keep no state; `runtime.cpp` divides the work. Every level adds in
// the same order, and no sum depends on which other tokens are in a call or on how rows are shared out among
// threads: a token's results are the same bits alone, in any batch and with any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.hpp"

namespace localmoe {

// Inputs of a product, packed for the level in groups of `Kernels::token_group` neighbours (the last may have
// fewer). A group of n tokens is interleaved, so that one address serves them all:
//   quantised   codes [C/4][n] words of four int8, scales [C/32][n], bias [spans][n]
//   float       values [C][n]
// In a level with tiles, groups of at least `Kernels::tile_tokens` have codes [n][C/4] instead, everything else
// alike; a product may read 16 rows of codes there, whatever n.
struct Tokens {
    size_t count;
    size_t columns;
    const int32_t* codes;
    const float* scales;
    const int32_t*
        bias;  // what the unsigned storage of weights adds too much, per weight scale span; see `quantize`
    const float* values;
};

// Where the rows of a product go: token t, row r at out[t * stride + r].
struct Output {
    float* out;
    size_t stride;
    bool add;  // to what is there
};

// Keys and values of one layer in the paged cache: keys [N][G][d][B], values [N][G][B][d], B a multiple of 16.
struct Cache {
    uint8_t* keys;
    uint8_t* values;
    bool bf16;  // else float
    size_t num_kv_heads;
    size_t head_dim;
    size_t block_tokens;
};

// Rows of queries that attend over the same keys: `num_tokens` neighbouring tokens, `num_heads` heads of each.
struct QueryTile {
    const float* q;  // [num_tokens][stride], the first head's first element
    float* out;      // [num_tokens][stride]
    size_t stride;
    size_t num_tokens;
    size_t num_heads;
    size_t kv_head;
    size_t first_position;  // of the first token; token i sees positions 0..first_position + i
    const int32_t* block_table;
};

// Most rows of one tile.
inline constexpr size_t kTileRows = 8;

// Tokens in a packed group of any level.
inline constexpr size_t kMaxTokenGroup = 16;

struct Kernels {
    const char* name;
    size_t token_group;  // tokens in a packed group

    // Groups of at least this many tokens are packed for tiles; 0: the level has none.
    size_t tile_tokens;

    // Rounds x [columns] to int8 in blocks of 32, for a product with weights of this format: scale = max|x| / 127
    // (NaN if the block holds a number that is not finite: then every output of the token is NaN), and per span of
    // a weight scale, the sum of the codes times the weights' offset, negated. Blocks below 1e-30 are taken for
    // zero.
    void (*quantize)(const float* x, size_t columns, Format weights, int8_t* codes, float* scales, int32_t* bias);

    // Rows of groups [first_group, last_group) for all tokens. `scratch` has `product_scratch_bytes`.
    void (*product)(const Matrix&, size_t first_group, size_t last_group, const Tokens&, Output, uint8_t* scratch);

    // silu(gate x) * (up x) for these rows.
    void (*gate_up)(const Matrix& gate, const Matrix& up, size_t first_group, size_t last_group, const Tokens&,
                    Output, uint8_t* scratch);

    // h = x / rms(x) * weight; in place if h == x.
    void (*rms_norm)(const float* x, const float* weight, size_t size, float eps, float* h);

    // Rotates half-split pairs of one head [d].
    void (*rotate)(float* head, const float* cosines, const float* sines, size_t head_dim);

    // Stores one token's key and value of every head ([G * d]) at a slot of the cache.
    void (*write_kv)(const Cache&, const float* key, const float* value, int64_t slot);

    // Softmax attention of a tile. `scratch` has `attend_scratch_floats`.
    void (*attend)(const Cache&, const QueryTile&, float* scratch);

    // out += sum over k of weights[k] * rows[k], in order of k.
    void (*weighted_sum)(const float* const* rows, const float* weights, size_t num_rows, size_t size, float* out);

    // weights = exp((logits - their maximum) / temperature), at least 0, the maximum's 1; returns the first
    // maximum's place, or -1 where a logit is not a finite number. Temperature 0 leaves the weights out.
    int32_t (*soften)(const float* logits, size_t size, float temperature, float* weights);

    // Reads all but up to 255 bytes at the end once; the result keeps the compiler from leaving it out.
    uint64_t (*read)(const uint8_t* data, size_t num_bytes);
};

inline constexpr size_t kAttendTokens = 128;  // keys whose scores are computed together

// Room for a row group of FP4 decoded to bytes and its scales to floats.
inline size_t product_scratch_bytes(size_t columns) { return columns * 16 + columns / 16 * 64; }

inline size_t attend_scratch_floats(size_t head_dim) {
    return kTileRows * (2 * head_dim + 2 * kAttendTokens + 16);
}

// The offset with which a format's codes are stored unsigned.
inline constexpr int weight_offset(Format format) { return format == Format::kInt8 ? 128 : 12; }

// Spans of a weight scale within a block of 32 columns.
inline constexpr size_t spans_per_block(Format format) { return format == Format::kNvfp4 ? 2 : 1; }

// The levels; each is defined where LOCALMOE_HAVE_<its name> is. Whether the machine can run one is for the caller
// to find out first.
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* amx_kernels();

}  // namespace localmoe
