#include "runtime.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace localmoe {
namespace {

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// The k largest logits, equal ones in order of id, and their shares of the softmax over all.
void choose_experts(const float* logits, size_t num_experts, size_t top_k, bool normalize, int32_t* ids,
                    float* weights) {
    for (size_t k = 0; k < top_k; ++k) {
        size_t best = num_experts;
        for (size_t e = 0; e < num_experts; ++e) {
            const bool better = best == num_experts || logits[e] > logits[best];
            if (better && std::find(ids, ids + k, static_cast<int32_t>(e)) == ids + k) best = e;
        }
        ids[k] = static_cast<int32_t>(best);
    }
    const float most = logits[ids[0]];
    float total = 0.0f, chosen = 0.0f;
    for (size_t e = 0; e < num_experts; ++e) total += std::exp(logits[e] - most);
    for (size_t k = 0; k < top_k; ++k) chosen += weights[k] = std::exp(logits[ids[k]] - most) / total;
    if (normalize) {
        for (size_t k = 0; k < top_k; ++k) weights[k] /= chosen;
    }
}

// A tile is all query heads of one key head, for as many neighbouring tokens as fit.
std::vector<QueryTile> query_tiles(const AttentionWeights& w, const Cache& cache, const Step& step, const float* q,
                                   float* attended) {
    const size_t d = w.head_dim, H = w.num_heads, G = cache.num_kv_heads, heads_per_kv = H / G;
    const size_t tile_heads = std::min(heads_per_kv, kTileRows),
                 tile_tokens = std::max<size_t>(1, kTileRows / tile_heads);
    const size_t head_parts = ceil_div(heads_per_kv, tile_heads);
    std::vector<QueryTile> tiles;
    for (const Span& span : step.spans) {
        // The last tokens see most keys; they go first, so that what is left at the end is short.
        for (size_t t = ceil_div(span.num_tokens, tile_tokens); t-- > 0;) {
            const size_t first = t * tile_tokens, count = std::min(tile_tokens, span.num_tokens - first);
            for (size_t g = 0; g < G; ++g) {
                for (size_t part = 0; part < head_parts; ++part) {
                    const size_t head = g * heads_per_kv + part * tile_heads;
                    const size_t heads = std::min(tile_heads, heads_per_kv - part * tile_heads);
                    const size_t offset = (span.first_row + first) * H * d + head * d;
                    tiles.push_back({q + offset, attended + offset, H * d, count, heads, g,
                                     span.first_position + first, span.block_table});
                }
            }
        }
    }
    return tiles;
}

}  // namespace

void Runtime::Packed::resize(size_t count, size_t columns, Format format) {
    weights = format;
    tokens.count = count;
    tokens.columns = columns;
    if (is_quantized(format)) {
        const size_t blocks = columns / kBlock;
        tokens.codes = codes.get((count + 16) * columns / 4);  // room for a tile to read on
        tokens.scales = scales.get(count * blocks);
        tokens.bias = bias.get(count * blocks * spans_per_block(format));
    } else {
        tokens.values = values.get(count * (columns + columns % 2));
    }
}

Tokens Runtime::Packed::from(size_t first, size_t count) const {
    Tokens part = tokens;
    part.count = count;
    if (is_quantized(weights)) {
        const size_t blocks = tokens.columns / kBlock;
        part.codes += first * tokens.columns / 4;
        part.scales += first * blocks;
        part.bias += first * blocks * spans_per_block(weights);
    } else {
        part.values += first * (tokens.columns + (weights == Format::kBf16 ? tokens.columns % 2 : 0));
    }
    return part;
}

void Runtime::prepare(size_t columns) {
    const size_t words = kernels_.token_group * (columns / 4 + 1),
                 blocks = kernels_.token_group * (columns / kBlock + 1);
    for (ThreadScratch& scratch : threads_) {
        scratch.product.get(product_scratch_bytes(columns));
        scratch.codes.get(words);
        scratch.scales.get(blocks);
        scratch.bias.get(2 * blocks);
        scratch.rows.get(kernels_.token_group * columns);
    }
}

// Packs rows [first, first + count) of `packed`, one token group.
void Runtime::pack(Packed& packed, size_t first, size_t count, const Row* rows) {
    const size_t columns = packed.tokens.columns;
    if (!is_quantized(packed.weights)) {
        const size_t padding = packed.weights == Format::kBf16 ? columns % 2 : 0;
        float* values = packed.values.data() + first * (columns + padding);
        for (size_t c = 0; c < columns; ++c) {
            for (size_t t = 0; t < count; ++t) values[c * count + t] = rows[t].values[c];
        }
        std::fill_n(values + columns * count, padding * count, 0.0f);
        return;
    }
    const size_t blocks = columns / kBlock, spans = blocks * spans_per_block(packed.weights);
    int32_t* codes = packed.codes.data() + first * columns / 4;
    float* scales = packed.scales.data() + first * blocks;
    int32_t* bias = packed.bias.data() + first * spans;
    if (kernels_.tile_tokens != 0 && count >= kernels_.tile_tokens) {
        for (size_t t = 0; t < count; ++t) std::memcpy(codes + t * columns / 4, rows[t].codes, columns);
    } else {
        for (size_t t = 0; t < count; ++t) {
            for (size_t c = 0; c < columns / 4; ++c) codes[c * count + t] = rows[t].codes[c];
        }
    }
    for (size_t t = 0; t < count; ++t) {
        for (size_t b = 0; b < blocks; ++b) scales[b * count + t] = rows[t].scales[b];
        for (size_t s = 0; s < spans; ++s) bias[s * count + t] = rows[t].bias[s];
    }
}

// The same from float rows x [.][stride], normed first if there is a norm.
void Runtime::quantize_and_pack(Packed& packed, size_t first, size_t count, const float* x, size_t stride,
                                ThreadScratch& scratch, const float* norm, float eps) {
    const size_t columns = packed.tokens.columns;
    const size_t blocks = columns / kBlock, spans = blocks * spans_per_block(packed.weights);
    Row rows[kMaxTokenGroup];
    for (size_t t = 0; t < count; ++t) {
        const float* row = x + (first + t) * stride;
        if (norm) {
            float* normed = scratch.rows.data() + t * columns;
            kernels_.rms_norm(row, norm, columns, eps, normed);
            row = normed;
        }
        int32_t* codes = scratch.codes.data() + t * columns / 4;
        float* scales = scratch.scales.data() + t * blocks;
        int32_t* bias = scratch.bias.data() + t * spans;
        if (is_quantized(packed.weights)) {
            kernels_.quantize(row, columns, packed.weights, reinterpret_cast<int8_t*>(codes), scales, bias);
        }
        rows[t] = {codes, scales, bias, row};
    }
    pack(packed, first, count, rows);
}

// All of `packed`, group by group.
void Runtime::quantize_and_pack_all(Packed& packed, const float* x, size_t stride, Items& groups,
                                    ThreadScratch& scratch, const float* norm, float eps) {
    for (size_t group; groups.take(group);) {
        const size_t first = group * kernels_.token_group;
        const size_t count = std::min(kernels_.token_group, packed.tokens.count - first);
        quantize_and_pack(packed, first, count, x, stride, scratch, norm, eps);
    }
}

void Runtime::run_product(const Matrix& matrix, const Tokens& tokens, Output output, Runs& groups,
                          ThreadScratch& scratch) {
    for (size_t first, last; groups.take(first, last);) {
        kernels_.product(matrix, first, last, tokens, output, scratch.product.data());
    }
}

void Runtime::embed(const Matrix& matrix, const int32_t* ids, size_t count, float* out) {
    Items items(count);
    pool_.run([&](int) {
        for (size_t i; items.take(i);) read_row(matrix, static_cast<size_t>(ids[i]), out + i * matrix.columns);
    });
}

void Runtime::logits(const float* norm, float eps, const Matrix& head, const float* x, size_t num_tokens,
                     float* out) {
    prepare(head.columns);
    inputs_.resize(num_tokens, head.columns, head.format);
    Items groups(group_count(num_tokens));
    Runs rows = runs_of(head);
    pool_.run([&](int thread) {
        auto& scratch = threads_[static_cast<size_t>(thread)];
        quantize_and_pack_all(inputs_, x, head.columns, groups, scratch, norm, eps);
        pool_.barrier();
        run_product(head, inputs_.tokens, {out, head.rows, false}, rows, scratch);
    });
}

void Runtime::attention(const AttentionWeights& w, const Cache& cache, const Step& step, float* x) {
    const size_t T = step.num_tokens, D = w.q.columns, d = w.head_dim, H = w.num_heads, G = cache.num_kv_heads;
    float* q = q_.get(T * H * d);
    float* k = k_.get(T * G * d);
    float* v = v_.get(T * G * d);
    float* attended = attended_.get(T * H * d);
    prepare(std::max(D, H * d));
    for (ThreadScratch& scratch : threads_) scratch.floats.get(attend_scratch_floats(d));
    inputs_.resize(T, D, w.q.format);
    inner_.resize(T, H * d, w.o.format);

    const std::vector<QueryTile> tiles = query_tiles(w, cache, step, q, attended);
    Runs q_rows = runs_of(w.q), k_rows = runs_of(w.k), v_rows = runs_of(w.v), o_rows = runs_of(w.o);
    Items groups(group_count(T)), tokens(T), tile_items(tiles.size()), out_groups(group_count(T));
    pool_.run([&](int thread) {
        auto& scratch = threads_[static_cast<size_t>(thread)];
        quantize_and_pack_all(inputs_, x, D, groups, scratch, w.norm, w.eps);
        pool_.barrier();
        run_product(w.q, inputs_.tokens, {q, H * d, false}, q_rows, scratch);
        run_product(w.k, inputs_.tokens, {k, G * d, false}, k_rows, scratch);
        run_product(w.v, inputs_.tokens, {v, G * d, false}, v_rows, scratch);
        pool_.barrier();
        for (size_t t; tokens.take(t);) {
            const auto finish = [&](float* row, size_t heads, const float* norm) {
                if (w.qk_norm == QkNorm::kProjection) kernels_.rms_norm(row, norm, heads * d, w.eps, row);
                for (size_t head = 0; head < heads; ++head) {
                    float* place = row + head * d;
                    if (w.qk_norm == QkNorm::kHead) kernels_.rms_norm(place, norm, d, w.eps, place);
                    kernels_.rotate(place, step.cosines + t * d / 2, step.sines + t * d / 2, d);
                }
            };
            finish(q + t * H * d, H, w.q_norm);
            finish(k + t * G * d, G, w.k_norm);
            kernels_.write_kv(cache, k + t * G * d, v + t * G * d, step.slots[t]);
        }
        pool_.barrier();
        for (size_t tile; tile_items.take(tile);) kernels_.attend(cache, tiles[tile], scratch.floats.data());
        pool_.barrier();
        quantize_and_pack_all(inner_, attended, H * d, out_groups, scratch, nullptr, 0.0f);
        pool_.barrier();
        run_product(w.o, inner_.tokens, {x, D, true}, o_rows, scratch);
    });
}

void Runtime::route(const float* norm, float eps, const Matrix& router, size_t top_k, bool normalize,
                    const float* x, size_t num_tokens, float* h, int32_t* ids, float* weights) {
    const size_t D = router.columns, E = router.rows;
    float* scores = scores_.get(num_tokens * E);
    prepare(D);
    inputs_.resize(num_tokens, D, router.format);
    Items norms(num_tokens), groups(group_count(num_tokens)), tokens(num_tokens);
    Runs rows = runs_of(router);
    pool_.run([&](int thread) {
        auto& scratch = threads_[static_cast<size_t>(thread)];
        for (size_t t; norms.take(t);) kernels_.rms_norm(x + t * D, norm, D, eps, h + t * D);
        pool_.barrier();
        quantize_and_pack_all(inputs_, h, D, groups, scratch, nullptr, 0.0f);
        pool_.barrier();
        run_product(router, inputs_.tokens, {scores, E, false}, rows, scratch);
        pool_.barrier();
        for (size_t t; tokens.take(t);) {
            choose_experts(scores + t * E, E, top_k, normalize, ids + t * top_k, weights + t * top_k);
        }
    });
}

void Runtime::norm(const float* weight, float eps, const float* x, size_t num_tokens, size_t columns, float* h) {
    for_each_token(num_tokens,
                   [&](size_t t) { kernels_.rms_norm(x + t * columns, weight, columns, eps, h + t * columns); });
}

Runtime::ExpertPlan::ExpertPlan(size_t num_experts, const int32_t* ids, size_t num_pairs)
    : pairs(num_pairs), place_of(num_pairs), shares(num_experts), share_of(num_pairs) {
    for (size_t i = 0; i < num_pairs; ++i) {
        if (ids[i] >= 0) ++shares[static_cast<size_t>(ids[i])].count;
    }
    size_t first = 0;
    for (Share& share : shares) {
        share.first = first;
        first += std::exchange(share.count, 0);
    }
    for (size_t i = 0; i < num_pairs; ++i) {
        if (ids[i] < 0) {
            place_of[i] = kNowhere;
            continue;
        }
        const auto expert = static_cast<size_t>(ids[i]);
        Share& share = shares[expert];
        const size_t place = share.first + share.count++;
        pairs[place] = i;
        place_of[i] = place;
        share_of[place] = expert;
    }
}

void Runtime::moe_begin(size_t num_experts, const Expert& like, const float* h, const int32_t* ids,
                        size_t num_tokens, size_t top_k) {
    Moe& moe = moe_;
    const size_t num_pairs = num_tokens * top_k;
    moe.plan.emplace(num_experts, ids, num_pairs);
    moe.num_tokens = num_tokens;
    moe.top_k = top_k;
    moe.hidden_size = like.gate.columns;
    moe.expert_size = like.gate.rows;
    moe.format = like.gate.format;
    const size_t D = moe.hidden_size, F = moe.expert_size, F_padded = like.gate.num_groups() * kRowGroup;
    const size_t blocks = D / kBlock, spans = blocks * spans_per_block(moe.format);
    prepare(std::max(D, F));
    moe.inputs.resize(num_pairs, D, moe.format);
    moe.inner.resize(num_pairs, F, moe.format);
    moe.hidden.get(num_pairs * F_padded);
    moe.expert_out.get(num_pairs * D);
    if (!is_quantized(moe.format)) {
        std::copy_n(h, num_tokens * D, moe.values.get(num_tokens * D));
        return;
    }
    auto* codes = moe.codes.get(num_tokens * D / 4);
    auto* scales = moe.scales.get(num_tokens * blocks);
    auto* bias = moe.bias.get(num_tokens * spans);
    for_each_token(num_tokens, [&](size_t t) {
        kernels_.quantize(h + t * D, D, moe.format, reinterpret_cast<int8_t*>(codes + t * D / 4),
                          scales + t * blocks, bias + t * spans);
    });
}

Runtime::MoePart::MoePart(std::vector<Share> some_shares, std::vector<Group> some_groups, int num_threads)
    : shares(std::move(some_shares)),
      groups(std::move(some_groups)),
      in_groups(groups.size()),
      inner_groups(groups.size()),
      up_rows(shares.size() * shares[0].expert.gate.num_groups(), num_threads),
      down_rows(shares.size() * shares[0].expert.down.num_groups(), num_threads),
      in_left(groups.size()),
      up_left(shares.size() * shares[0].expert.gate.num_groups()),
      inner_left(groups.size()) {}

void Runtime::moe_compute(const Expert* const* experts, const int32_t* ids, size_t count) {
    Moe& moe = moe_;
    std::vector<MoePart::Share> shares;
    std::vector<MoePart::Group> groups;
    for (size_t i = 0; i < count; ++i) {
        auto& share = moe.plan->shares[static_cast<size_t>(ids[i])];
        if (share.count == 0) continue;
        share.computed = true;
        shares.push_back({*experts[i], share.first, share.count});
        for (size_t first = 0; first < share.count; first += kernels_.token_group) {
            groups.push_back({share.first + first, std::min(kernels_.token_group, share.count - first)});
        }
    }
    if (shares.empty()) return;
    prepare(std::max(moe.hidden_size, moe.expert_size));
    moe.part.emplace(std::move(shares), std::move(groups), pool_.num_threads());
    pool_.begin([](void* runtime, int thread) noexcept { static_cast<Runtime*>(runtime)->compute_part(thread); },
                this);
}

void Runtime::compute_part(int thread) {
    Moe& moe = moe_;
    MoePart& part = *moe.part;
    const size_t D = moe.hidden_size, blocks = D / kBlock, spans = blocks * spans_per_block(moe.format);
    const Matrix &gate = part.shares[0].expert.gate, &down = part.shares[0].expert.down;
    const size_t F_padded = gate.num_groups() * kRowGroup;
    float* hidden = moe.hidden.data();
    float* expert_out = moe.expert_out.data();
    auto& scratch = threads_[static_cast<size_t>(thread)];
    uint8_t* bytes = scratch.product.data();
    // A run of all shares' row groups, share by share: function(share, first row group, last).
    const auto split = [&](size_t first, size_t last, size_t groups_per_share, auto&& function) {
        while (first < last) {
            const size_t from = first % groups_per_share;
            const size_t to = std::min(groups_per_share, from + last - first);
            function(part.shares[first / groups_per_share], from, to);
            first += to - from;
        }
    };
    for (size_t g; part.in_groups.take(g); part.in_left.done()) {
        const auto [first, size] = part.groups[g];
        Row packed[kMaxTokenGroup];
        for (size_t i = 0; i < size; ++i) {
            const size_t t = moe.plan->pairs[first + i] / moe.top_k;
            packed[i] = {moe.codes.data() + t * D / 4, moe.scales.data() + t * blocks, moe.bias.data() + t * spans,
                         moe.values.data() + t * D};
        }
        pack(moe.inputs, first, size, packed);
    }
    part.in_left.wait();
    for (size_t first, last; part.up_rows.take(first, last); part.up_left.done(last - first)) {
        split(first, last, gate.num_groups(), [&](const MoePart::Share& share, size_t from, size_t to) {
            kernels_.gate_up(share.expert.gate, share.expert.up, from, to,
                             moe.inputs.from(share.first, share.count),
                             {hidden + share.first * F_padded, F_padded, false}, bytes);
        });
    }
    part.up_left.wait();
    for (size_t g; part.inner_groups.take(g); part.inner_left.done()) {
        const auto [first, size] = part.groups[g];
        quantize_and_pack(moe.inner, first, size, hidden, F_padded, scratch, nullptr, 0.0f);
    }
    part.inner_left.wait();
    for (size_t first, last; part.down_rows.take(first, last);) {
        split(first, last, down.num_groups(), [&](const MoePart::Share& share, size_t from, size_t to) {
            kernels_.product(share.expert.down, from, to, moe.inner.from(share.first, share.count),
                             {expert_out + share.first * D, D, false}, bytes);
        });
    }
}

void Runtime::moe_finish(const float* weights, float* x) {
    const Moe& moe = moe_;
    const ExpertPlan& plan = *moe.plan;
    const size_t D = moe.hidden_size, top_k = moe.top_k;
    for_each_token(moe.num_tokens, [&](size_t t) {
        const float* parts[kMaxTopK];
        float shares[kMaxTopK];
        size_t count = 0;
        for (size_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
            const size_t place = plan.place_of[pair];
            if (place == ExpertPlan::kNowhere || !plan.shares[plan.share_of[place]].computed) continue;
            parts[count] = moe.expert_out.data() + place * D;
            shares[count++] = weights[pair];
        }
        if (count > 0) kernels_.weighted_sum(parts, shares, count, D, x + t * D);
    });
    moe_.plan.reset();
}

void Runtime::draw(const float* logits, size_t num_rows, size_t size, const float* temperatures,
                   const Filter* filters, const double* uniforms, int32_t* ids) {
    Items rows(num_rows);
    for (ThreadScratch& scratch : threads_) {
        scratch.floats.get(size);
        scratch.candidates.reserve(size);
    }
    pool_.run([&](int thread) {
        auto& scratch = threads_[static_cast<size_t>(thread)];
        float* weights = scratch.floats.data();
        for (size_t row; rows.take(row);) {
            ids[row] = kernels_.soften(logits + row * size, size, temperatures[row], weights);
            if (ids[row] >= 0 && temperatures[row] > 0.0f) {
                ids[row] = localmoe::draw(weights, size, filters[row], uniforms[row], scratch.candidates);
            }
        }
    });
}

uint64_t Runtime::read(const uint8_t* data, size_t num_bytes) {
    constexpr size_t kPiece = 1 << 20;
    Items items(ceil_div(num_bytes, kPiece));
    std::atomic<uint64_t> sum{0};
    pool_.run([&](int) {
        for (size_t i; items.take(i);)
            sum += kernels_.read(data + i * kPiece, std::min(kPiece, num_bytes - i * kPiece));
    });
    return sum;
}

}  // namespace localmoe
