// Paged attention (Kwon et al., 2023) with the running softmax of Milakov & Gimelshein (2018), written once for
// all levels.
//
// Keys lie transposed in their block, so that sixteen neighbouring tokens are the lanes of a vector and scores
// need no sum across lanes. Rows of a tile share what is loaded; each row's arithmetic depends on its own query
// and position only. Whatever lies in the cache beyond a row's position is never added in.
#pragma once

#include <type_traits>

#include "math.hpp"

namespace {

using localmoe::Cache;
using localmoe::kAttendTokens;
using localmoe::QueryTile;

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void write_kv(const Cache& cache, const float* key, const float* value, int64_t slot) {
    const size_t d = cache.head_dim, B = cache.block_tokens;
    const size_t block = static_cast<size_t>(slot) / B, offset = static_cast<size_t>(slot) % B;
    for (size_t g = 0; g < cache.num_kv_heads; ++g) {
        const size_t head = (block * cache.num_kv_heads + g) * d * B;
        if (cache.bf16) {
            auto* keys = reinterpret_cast<uint16_t*>(cache.keys) + head + offset;
            auto* values = reinterpret_cast<uint16_t*>(cache.values) + head + offset * d;
            for (size_t i = 0; i < d; ++i) keys[i * B] = to_bf16(key[g * d + i]);
            for (size_t i = 0; i < d; ++i) values[i] = to_bf16(value[g * d + i]);
        } else {
            auto* keys = reinterpret_cast<float*>(cache.keys) + head + offset;
            auto* values = reinterpret_cast<float*>(cache.values) + head + offset * d;
            for (size_t i = 0; i < d; ++i) keys[i * B] = key[g * d + i];
            for (size_t i = 0; i < d; ++i) values[i] = value[g * d + i];
        }
    }
}

template <class S>
inline typename S::F load_kv(const float* p) {
    return S::load(p);
}
template <class S>
inline typename S::F load_kv(const uint16_t* p) {
    return S::as_float(S::template shift_left<16>(S::from_words(p)));
}
template <class S, class T>
inline typename S::F load_kv_first(const T* p, size_t n) {
    alignas(64) T padded[16] = {};
    for (size_t lane = 0; lane < n; ++lane) padded[lane] = p[lane];
    return load_kv<S>(padded);
}

// A tile's state: `chunk` by chunk of at most kAttendTokens keys, scores become shares, and shares of values are
// summed.
template <class S, class T, int rows>
class TileAttention {
public:
    using F = typename S::F;

    TileAttention(const Cache& cache, const QueryTile& tile, float* scratch)
        : cache_(cache),
          tile_(tile),
          d_(cache.head_dim),
          width_((d_ + 15) / 16 * 16),
          queries_(scratch),
          sums_(queries_ + d_ * rows),
          scores_(sums_ + rows * width_),
          shares_(scores_ + rows * kAttendTokens) {
        const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(d_));
        for (size_t row = 0; row < rows; ++row) {
            const size_t r = row < num_rows() ? row : 0;  // unused rows repeat the first
            const float* q = tile.q + r / tile.num_heads * tile.stride + r % tile.num_heads * d_;
            for (size_t i = 0; i < d_; ++i) queries_[i * rows + row] = q[i] * factor;
            visible_[row] = tile.first_position + r / tile.num_heads + 1;
            largest_[row] = -__builtin_inff();
            totals_[row] = 0.0f;
        }
        for (size_t i = 0; i < rows * width_; ++i) sums_[i] = 0.0f;
    }

    void run() {
        const size_t length = tile_.first_position + tile_.num_tokens;
        for (size_t start = 0; start < length; start += kAttendTokens) {
            const size_t count = length - start < kAttendTokens ? length - start : kAttendTokens;
            score_keys(start, count);
            for (int row = 0; row < rows; ++row) soften_scores(row, start, count);
            add_values(start, count);
        }
        for (size_t row = 0; row < num_rows(); ++row) {
            float* out = tile_.out + row / tile_.num_heads * tile_.stride + row % tile_.num_heads * d_;
            const float inverse = 1.0f / totals_[row];
            for (size_t i = 0; i < d_; ++i) out[i] = sums_[row * width_ + i] * inverse;
        }
    }

private:
    size_t num_rows() const { return tile_.num_tokens * tile_.num_heads; }

    // Of `count` keys from `start` on, those that a row sees.
    size_t seen(size_t row, size_t start, size_t count) const {
        const size_t before = visible_[row] <= start ? 0 : visible_[row] - start;
        return before < count ? before : count;
    }

    // Where the tile's key head of the block with this position lies.
    const T* block_at(const uint8_t* all, size_t position) const {
        const auto block = static_cast<size_t>(tile_.block_table[position / cache_.block_tokens]);
        const size_t head_size = d_ * cache_.block_tokens;
        return reinterpret_cast<const T*>(all) + (block * cache_.num_kv_heads + tile_.kv_head) * head_size;
    }

    void score_keys(size_t start, size_t count) {
        const size_t B = cache_.block_tokens;
        for (size_t t = 0; t < count; t += 16) {
            const T* keys = block_at(cache_.keys, start + t) + (start + t) % B;
            F dots[rows];
            for (auto& dot : dots) dot = S::zero();
            for (size_t i = 0; i < d_; ++i) {
                const F key = load_kv<S>(keys + i * B);
#pragma GCC unroll 8
                for (int row = 0; row < rows; ++row)
                    dots[row] = S::fma(key, S::set1(queries_[i * rows + row]), dots[row]);
            }
            for (int row = 0; row < rows; ++row) S::store(scores_ + row * kAttendTokens + t, dots[row]);
        }
    }

    void soften_scores(int row, size_t start, size_t count) {
        const size_t n = seen(row, start, count);
        float* scores = scores_ + row * kAttendTokens;
        const auto lanes_at = [n](size_t t) { return n - t < 16 ? static_cast<int>(n - t) : 16; };
        F most = S::set1(largest_[row]), total = S::zero();
        for (size_t t = 0; t < n; t += 16) {
            most = S::max(most, S::first(S::load(scores + t), S::set1(-__builtin_inff()), lanes_at(t)));
        }
        const float now = max_lanes<S>(most);
        for (size_t t = 0; t < n; t += 16) {
            const F e = S::first(exp<S>(S::sub(S::load(scores + t), S::set1(now))), S::zero(), lanes_at(t));
            S::store(scores + t, e);
            total = S::add(total, e);
        }
        if (n > 0) {
            const float kept = largest_[row] == -__builtin_inff() ? 0.0f : __builtin_expf(largest_[row] - now);
            float* sums = sums_ + row * width_;
            for (size_t i = 0; i < width_ && kept != 1.0f; i += 16)
                S::store(sums + i, S::mul(S::load(sums + i), S::set1(kept)));
            totals_[row] = totals_[row] * kept + sum_lanes<S>(total);
            largest_[row] = now;
        }
        for (size_t t = 0; t < count; ++t) shares_[t * rows + row] = t < n ? scores[t] : 0.0f;
    }

    void add_values(size_t start, size_t count) {
        const T* places[kAttendTokens];
        for (size_t t = 0; t < count; ++t) {
            places[t] = block_at(cache_.values, start + t) + (start + t) % cache_.block_tokens * d_;
        }
        // Past the first row's last key, only the rows that see a value add it: zero times NaN would be NaN.
        const size_t shared = seen(0, start, count);
        for (size_t i = 0; i < d_; i += 16) {
            const size_t lanes = d_ - i < 16 ? d_ - i : 16;
            F parts[rows];
            for (int row = 0; row < rows; ++row) parts[row] = S::load(sums_ + row * width_ + i);
            for (size_t t = 0; t < count; ++t) {
                const F value = lanes == 16 ? load_kv<S>(places[t] + i) : load_kv_first<S>(places[t] + i, lanes);
                const float* shares = shares_ + t * rows;
                if (t < shared) {
#pragma GCC unroll 8
                    for (int row = 0; row < rows; ++row)
                        parts[row] = S::fma(value, S::set1(shares[row]), parts[row]);
                } else {
                    for (int row = 0; row < rows; ++row) {
                        if (start + t < visible_[row])
                            parts[row] = S::fma(value, S::set1(shares[row]), parts[row]);
                    }
                }
            }
            for (int row = 0; row < rows; ++row) S::store(sums_ + row * width_ + i, parts[row]);
        }
    }

    const Cache& cache_;
    const QueryTile& tile_;
    const size_t d_, width_;
    float* const queries_;  // [d][rows]
    float* const sums_;     // [rows][d rounded up to 16]
    float* const scores_;   // [rows][kAttendTokens]
    float* const shares_;   // [kAttendTokens][rows]
    float largest_[rows], totals_[rows];
    size_t visible_[rows];
};

template <class S>
void attend(const Cache& cache, const QueryTile& tile, float* scratch) {
    const size_t rows = tile.num_tokens * tile.num_heads;
    const auto run = [&](auto constant) {
        cache.bf16 ? TileAttention<S, uint16_t, constant>(cache, tile, scratch).run()
                   : TileAttention<S, float, constant>(cache, tile, scratch).run();
    };
    if (rows == 1) return run(std::integral_constant<int, 1>{});
    if (rows <= 2) return run(std::integral_constant<int, 2>{});
    if (rows <= 4) return run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 8>{});
}

}  // namespace
