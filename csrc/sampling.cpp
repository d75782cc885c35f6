#include "sampling.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>

namespace localmoe {
namespace {

// Floats from 0 to 1 in order of size: exponent and three bits of the mantissa.
constexpr size_t kBuckets = (0x3F800000u >> 20) + 1;
size_t bucket_of(float weight) { return std::bit_cast<uint32_t>(weight) >> 20; }

struct Bucket {
    double mass = 0.0;
    size_t count = 0;
};

// The least weight such that those above it, from the largest down, satisfy `enough(mass, count)` only with it.
template <class Enough>
float floor_of(const float* weights, size_t n, float least, Enough&& enough, std::vector<float>& scratch) {
    std::array<Bucket, kBuckets> buckets;
    for (size_t i = 0; i < n; ++i) {
        if (weights[i] < least) continue;
        Bucket& bucket = buckets[bucket_of(weights[i])];
        bucket.mass += weights[i];
        ++bucket.count;
    }
    Bucket above;
    for (size_t b = kBuckets; b-- > 0;) {
        if (!enough(above.mass + buckets[b].mass, above.count + buckets[b].count)) {
            above.mass += buckets[b].mass;
            above.count += buckets[b].count;
            continue;
        }
        scratch.clear();
        for (size_t i = 0; i < n; ++i) {
            if (weights[i] >= least && bucket_of(weights[i]) == b) scratch.push_back(weights[i]);
        }
        std::sort(scratch.begin(), scratch.end(), std::greater<>());
        for (float weight : scratch) {
            above.mass += weight;
            if (enough(above.mass, ++above.count)) return weight;
        }
    }
    return least;
}

}  // namespace

int32_t draw(const float* weights, size_t n, Filter filter, double uniform, std::vector<float>& scratch) {
    float least = 0.0f;
    if (filter.top_k > 0 && static_cast<size_t>(filter.top_k) < n) {
        const auto k = static_cast<size_t>(filter.top_k);
        least = floor_of(weights, n, least, [k](double, size_t count) { return count >= k; }, scratch);
    }
    if (filter.top_p < 1.0f) {
        double total = 0.0;
        for (size_t i = 0; i < n; ++i) total += weights[i] >= least ? weights[i] : 0.0f;
        const double wanted = static_cast<double>(filter.top_p) * total;
        least = floor_of(weights, n, least, [wanted](double mass, size_t) { return mass >= wanted; }, scratch);
    }
    least = std::max(least, filter.min_p);
    double total = 0.0;
    for (size_t i = 0; i < n; ++i) total += weights[i] >= least ? weights[i] : 0.0f;
    const double target = uniform * total;
    double sum = 0.0;
    size_t last = 0;
    for (size_t i = 0; i < n; ++i) {
        if (weights[i] < least || weights[i] == 0.0f) continue;
        sum += weights[i];
        last = i;
        if (sum > target) break;
    }
    return static_cast<int32_t>(last);
}

}  // namespace localmoe
