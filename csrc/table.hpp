// A level's table from its sixteen-lane arithmetic.
#pragma once

#include "attention.hpp"
#include "product.hpp"

namespace {

template <class S>
constexpr localmoe::Kernels table(const char* name) {
    static_assert(S::kTokens <= localmoe::kMaxTokenGroup);
    return {
        .name = name,
        .token_group = S::kTokens,
        .tile_tokens = S::kTileTokens,
        .quantize = quantize<S>,
        .product = product<S>,
        .gate_up = gate_up<S>,
        .rms_norm = rms_norm<S>,
        .rotate = rotate,
        .write_kv = write_kv,
        .attend = attend<S>,
        .weighted_sum = weighted_sum<S>,
        .soften = soften<S>,
        .read = read<S>,
    };
}

}  // namespace
