// From the weights of a softmax to a token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace localmoe {

// Which tokens a draw may take; neutral values exclude nothing.
struct Filter {
    int32_t top_k;  // only the k likeliest; 0: all
    float top_p;    // then the likeliest that together hold this share (Holtzman et al., 2020); 1: all
    float min_p;    // then those at least this share of the likeliest; 0: all
};

// The token at which the running sum of the weights that pass, in order of id, exceeds `uniform` times their sum.
//
// Weights [n] are at least zero, the largest is 1. Tokens as likely as the last that passes pass, too. `scratch`
// is overwritten. Takes a few passes over the weights and sorts almost none of them.
int32_t draw(const float* weights, size_t n, Filter filter, double uniform, std::vector<float>& scratch);

}  // namespace localmoe
