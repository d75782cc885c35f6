// The operations of a decoder on many threads: divides the work of `kernels.hpp` among a pool.
//
// Every operation is one call: the threads go through its phases together and meet between them. Rows of weights
// are shared out, sums never are, so results do not depend on the number of threads.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "sampling.hpp"

namespace localmoe {

inline constexpr size_t kMaxTopK = 64;

enum class QkNorm { kNone, kHead, kProjection };

struct AttentionWeights {
    const float* norm;  // [D]
    Matrix q, k, v, o;
    const float* q_norm;  // [d] or [H * d]; null without
    const float* k_norm;  // [d] or [G * d]
    QkNorm qk_norm;
    size_t num_heads;
    size_t head_dim;
    float eps;
};

// One sequence's tokens in a step: rows first_row.. of the batch, positions first_position.. of the sequence.
struct Span {
    size_t first_row;
    size_t num_tokens;
    size_t first_position;
    const int32_t* block_table;
};

struct Step {
    size_t num_tokens;
    std::vector<Span> spans;
    const int64_t* slots;  // [T], block * B + offset
    const float* cosines;  // [T][d / 2]
    const float* sines;
};

struct Expert {
    Matrix gate, up, down;
};

// A buffer that grows and never shrinks; contents do not survive growing.
template <class T>
class Scratch {
public:
    T* get(size_t count) {
        if (count > capacity_) {
            // Freed first: both would not always fit.
            data_.reset();
            capacity_ = 0;
            data_.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
            capacity_ = count;
        }
        return data_.get();
    }

    T* data() const { return data_.get(); }

private:
    struct Delete {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    std::unique_ptr<T[], Delete> data_;
    size_t capacity_ = 0;
};

class Runtime {
    static constexpr size_t kFewTokens = 4;

public:
    Runtime(const Kernels& kernels, int num_threads, bool pin) : kernels_(kernels), pool_(num_threads, pin) {}
    ~Runtime() { join(); }

    // Rows of a matrix as float: out [count][columns].
    void embed(const Matrix& matrix, const int32_t* ids, size_t count, float* out);

    // x [T][D] += o(attention(rotated, normed qkv(norm(x)))); stores the step's keys and values first.
    void attention(const AttentionWeights& weights, const Cache& cache, const Step& step, float* x);

    // h [T][D] = norm(x); the k likeliest experts of softmax(router h) and their weights, ties to the lower id.
    void route(const float* norm, float eps, const Matrix& router, size_t top_k, bool normalize, const float* x,
               size_t num_tokens, float* h, int32_t* ids, float* weights);

    // h [T][D] = norm(x).
    void norm(const float* weight, float eps, const float* x, size_t num_tokens, size_t columns, float* h);

    // x [T][D] += sum over k of weights[t][k] * expert ids[t][k] of h [T][D], in as many parts as it takes for the
    // weights to arrive: begin, then compute for each of the experts once, then finish. What was not computed is
    // left out of the sum, and so is a pair whose id is -1; in which parts the rest was makes no difference to any
    // bit. h and ids are not needed after begin. Between begin and finish all other operations may run.
    void moe_begin(size_t num_experts, const Expert& like, const float* h, const int32_t* ids, size_t num_tokens,
                   size_t top_k);
    // experts[i] has id ids[i]; those that no token goes to are passed over. The other threads compute while the
    // caller does something else, and both together from `join` on.
    void moe_compute(const Expert* const* experts, const int32_t* ids, size_t count);
    void moe_finish(const float* weights, float* x);

    // Waits for what moe_compute began. Must come before any other operation, and before the weights go.
    void join() { pool_.join(); }

    // out [T][V] = norm(x) times the head transposed; without a norm if it is null.
    void logits(const float* norm, float eps, const Matrix& head, const float* x, size_t num_tokens, float* out);

    // A token from each row of logits [S][V], -1 where one is not a finite number; temperature 0 takes the
    // likeliest.
    void draw(const float* logits, size_t num_rows, size_t size, const float* temperatures, const Filter* filters,
              const double* uniforms, int32_t* ids);

    // Reads a buffer with all threads.
    uint64_t read(const uint8_t* data, size_t num_bytes);

private:
    // Inputs of one product, each group packed by whoever takes it.
    struct Packed {
        Scratch<int32_t> codes, bias;
        Scratch<float> scales, values;
        Tokens tokens;
        Format weights;

        void resize(size_t count, size_t columns, Format weights);
        // The tokens from `first` on as if they were all; `first` is a multiple of the token group.
        Tokens from(size_t first, size_t count) const;
    };
    // One token's inputs, quantised but not packed.
    struct Row {
        const int32_t* codes;
        const float* scales;
        const int32_t* bias;
        const float* values;
    };
    // The (token, slot) pairs of a step in order of expert, so that each expert is read once.
    struct ExpertPlan {
        // One expert's pairs: [first, first + count) of `pairs`.
        struct Share {
            size_t first, count;
            bool computed;
        };
        static constexpr size_t kNowhere = SIZE_MAX;
        std::vector<size_t> pairs;     // token * top_k + slot
        std::vector<size_t> place_of;  // the inverse; kNowhere for a pair of no expert
        std::vector<Share> shares;     // by expert
        std::vector<size_t> share_of;  // by pair in its place

        ExpertPlan(size_t num_experts, const int32_t* ids, size_t num_pairs);
    };
    // Experts of a step that are computed together, and how far that is.
    struct MoePart {
        struct Share {
            Expert expert;
            size_t first, count;  // its pairs
        };
        struct Group {
            size_t first, count;
        };
        std::vector<Share> shares;
        std::vector<Group> groups;  // of pairs that are packed together
        Items in_groups, inner_groups;
        Runs up_rows, down_rows;
        Remaining in_left, up_left, inner_left;

        MoePart(std::vector<Share> shares, std::vector<Group> groups, int num_threads);
    };
    // A layer's experts between begin and finish; its memory is not shared with other operations.
    struct Moe {
        std::optional<ExpertPlan> plan;
        size_t num_tokens, top_k, hidden_size, expert_size;
        Format format;
        Packed inputs, inner;
        Scratch<float> hidden, expert_out;
        // The tokens, quantised but not packed, or a copy of them.
        Scratch<int32_t> codes, bias;
        Scratch<float> scales, values;
        std::optional<MoePart> part;  // what is being computed
    };
    // One thread's own memory, sized before the threads run.
    struct ThreadScratch {
        Scratch<uint8_t> product;
        Scratch<float> floats;
        Scratch<int32_t> codes, bias;
        Scratch<float> scales, rows;
        std::vector<float> candidates;
    };

    // function(t) for each token: on all threads, or by the caller alone where waking them would take longer.
    template <class Function>
    void for_each_token(size_t num_tokens, Function&& function) {
        if (num_tokens <= kFewTokens) {
            for (size_t t = 0; t < num_tokens; ++t) function(t);
            return;
        }
        Items tokens(num_tokens);
        pool_.run([&](int) {
            for (size_t t; tokens.take(t);) function(t);
        });
    }
    size_t group_count(size_t num_tokens) const {
        return (num_tokens + kernels_.token_group - 1) / kernels_.token_group;
    }
    Runs runs_of(const Matrix& matrix, size_t count = 1) const {
        return Runs(count * matrix.num_groups(), pool_.num_threads());
    }
    // Sizes every thread's memory for products with this many columns.
    void prepare(size_t columns);
    void pack(Packed& packed, size_t first, size_t count, const Row* rows);
    void quantize_and_pack(Packed& packed, size_t first, size_t count, const float* x, size_t stride,
                           ThreadScratch& scratch, const float* norm, float eps);
    void quantize_and_pack_all(Packed& packed, const float* x, size_t stride, Items& groups,
                               ThreadScratch& scratch, const float* norm, float eps);
    // One thread's share of `moe_.part`.
    void compute_part(int thread);
    void run_product(const Matrix& matrix, const Tokens& tokens, Output output, Runs& groups,
                     ThreadScratch& scratch);

    const Kernels& kernels_;
    Pool pool_;
    std::vector<ThreadScratch> threads_ = std::vector<ThreadScratch>(static_cast<size_t>(pool_.num_threads()));
    Packed inputs_, inner_;
    Scratch<float> q_, k_, v_, attended_, scores_;
    Moe moe_;
};

}  // namespace localmoe
