// The extension module localmoe._cpu: checks what Python passes, lets go of the interpreter lock, computes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>

#include "levels.hpp"
#include "module_disk.hpp"
#include "runtime.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace localmoe {
namespace {

template <class T, int dimensions>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
using Floats = Array<float, 2>;
using ConstFloats = Array<const float, 2>;
using Vector = Array<const float, 1>;
using Bytes = Array<const uint8_t, 1>;
using Ids = Array<const int32_t, 1>;

constexpr size_t kMaxSize = 1u << 31;  // products of two sizes stay far below 2^64
constexpr size_t kMaxBlockTokens = 1u << 16;

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

Format parse_format(const std::string& name) {
    if (name == "mxfp4") return Format::kMxfp4;
    if (name == "nvfp4") return Format::kNvfp4;
    if (name == "int8") return Format::kInt8;
    if (name == "bf16") return Format::kBf16;
    if (name == "f32") return Format::kF32;
    throw std::invalid_argument("the format is none of mxfp4, nvfp4, int8, bf16, f32");
}

// The bound classes hold the arrays that their pointers point into.

struct BoundMatrix : Matrix {
    BoundMatrix(const std::string& name, size_t num_rows, size_t num_columns, Bytes value_bytes, Bytes scale_bytes,
                float scale)
        : Matrix{parse_format(name), num_rows, num_columns, value_bytes.data(), scale_bytes.data(), scale},
          owners{value_bytes, scale_bytes} {
        require(rows > 0 && columns > 0 && rows < kMaxSize && columns < kMaxSize,
                "a matrix has from 1 to 2^31 rows and columns");
        require(!is_quantized(format) || columns % kBlock == 0,
                "32 must divide the columns of a quantised matrix");
        require(value_bytes.size() == num_groups() * group_values_bytes(), "the values have another size");
        require(scale_bytes.size() == num_groups() * group_scales_bytes(), "the scales have another size");
    }

    std::vector<Bytes> owners;
};

struct BoundAttention : AttentionWeights {
    BoundAttention(Vector norm_D, const BoundMatrix& q_, const BoundMatrix& k_, const BoundMatrix& v_,
                   const BoundMatrix& o_, std::optional<Vector> q_norm_, std::optional<Vector> k_norm_,
                   size_t heads, size_t kv_heads, float eps_)
        : AttentionWeights{norm_D.data(),
                           q_,
                           k_,
                           v_,
                           o_,
                           nullptr,
                           nullptr,
                           QkNorm::kNone,
                           heads,
                           heads > 0 ? q_.rows / heads : 0,
                           eps_},
          matrices{q_, k_, v_, o_},
          vectors{norm_D},
          num_kv_heads(kv_heads) {
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && q.rows == heads * head_dim,
                "the heads do not divide");
        require(head_dim % 2 == 0, "the head size is odd");
        require(k.rows == kv_heads * head_dim && v.rows == k.rows && o.columns == q.rows, "q, k, v, o do not fit");
        require(
            k.columns == q.columns && v.columns == q.columns && o.rows == q.columns && norm_D.size() == q.columns,
            "the hidden sizes differ");
        require(k.format == q.format && v.format == q.format, "q, k and v have different formats");
        require(q_norm_.has_value() == k_norm_.has_value(), "q_norm and k_norm come together");
        if (!q_norm_) return;
        const bool by_head = q_norm_->size() == head_dim && k_norm_->size() == head_dim;
        require(by_head || (q_norm_->size() == q.rows && k_norm_->size() == k.rows),
                "q_norm or k_norm does not fit");
        qk_norm = by_head ? QkNorm::kHead : QkNorm::kProjection;
        q_norm = q_norm_->data();
        k_norm = k_norm_->data();
        vectors.push_back(*q_norm_);
        vectors.push_back(*k_norm_);
    }

    std::vector<BoundMatrix> matrices;
    std::vector<Vector> vectors;
    size_t num_kv_heads;
};

// The experts of a layer; those whose weights are here are placed.
struct BoundExperts {
    BoundExperts(const std::string& name, size_t count, size_t hidden_size, size_t expert_size)
        : like{empty(name, expert_size, hidden_size), empty(name, expert_size, hidden_size),
               empty(name, hidden_size, expert_size)},
          places(count) {
        require(count > 0 && hidden_size > 0 && expert_size > 0, "there is no expert");
        require(count < kMaxSize && hidden_size < kMaxSize && expert_size < kMaxSize, "a size is over 2^31");
        require(!is_quantized(like.gate.format) || (hidden_size % kBlock == 0 && expert_size % kBlock == 0),
                "32 must divide the sizes of quantised experts");
    }

    void place(size_t id, const BoundMatrix& gate, const BoundMatrix& up, const BoundMatrix& down) {
        require(id < places.size(), "an expert id is out of range");
        const auto fits = [](const Matrix& matrix, const Matrix& expected) {
            return matrix.format == expected.format && matrix.rows == expected.rows &&
                   matrix.columns == expected.columns;
        };
        require(fits(gate, like.gate) && fits(up, like.up) && fits(down, like.down),
                "the expert's matrices are not of the layer's format and sizes");
        places[id].emplace(Place{{gate, up, down}, {gate, up, down}});
    }

    void remove(size_t id) {
        require(id < places.size(), "an expert id is out of range");
        places[id].reset();
    }

    const Expert* at(int32_t id) const {
        require(id >= 0 && static_cast<size_t>(id) < places.size(), "an expert id is out of range");
        const auto& place = places[static_cast<size_t>(id)];
        require(place.has_value(), "an expert is not placed");
        return &place->expert;
    }

    struct Place {
        Expert expert;
        std::vector<BoundMatrix> owners;
    };
    const Expert like;
    std::vector<std::optional<Place>> places;

private:
    static Matrix empty(const std::string& name, size_t rows, size_t columns) {
        return {parse_format(name), rows, columns, nullptr, nullptr, 1.0f};
    }
};

struct BoundRuntime : Runtime {
    using Runtime::Runtime;
    ~BoundRuntime() { join(); }

    void embed(const BoundMatrix& matrix, Ids ids, Floats out) {
        require(out.shape(0) == ids.size() && out.shape(1) == matrix.columns, "out is not [ids, columns]");
        for (size_t i = 0; i < ids.size(); ++i) {
            require(ids.data()[i] >= 0 && static_cast<size_t>(ids.data()[i]) < matrix.rows,
                    "an id is out of range");
        }
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::embed(matrix, ids.data(), ids.size(), out.data());
    }

    void linear(const BoundMatrix& matrix, ConstFloats x, Floats out) {
        require(x.shape(1) == matrix.columns && out.shape(1) == matrix.rows && out.shape(0) == x.shape(0),
                "x or out does not fit the matrix");
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::logits(nullptr, 0.0f, matrix, x.data(), x.shape(0), out.data());
    }

    void logits(Vector norm, float eps, const BoundMatrix& head, ConstFloats x, Floats out) {
        require(norm.size() == head.columns && x.shape(1) == head.columns && out.shape(1) == head.rows &&
                    out.shape(0) == x.shape(0),
                "norm, x or out does not fit the head");
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::logits(norm.data(), eps, head, x.data(), x.shape(0), out.data());
    }

    // Keys and values as bytes [N, bytes of a block]; float or bfloat16 follows from the size.
    void attention(const BoundAttention& weights, Array<uint8_t, 2> keys, Array<uint8_t, 2> values, bool bf16,
                   size_t block_tokens, Array<const int32_t, 2> spans, Array<const int32_t, 2> tables,
                   Array<const int64_t, 1> slots, ConstFloats cosines, ConstFloats sines, Floats x) {
        const size_t T = x.shape(0), d = weights.head_dim, G = weights.num_kv_heads;
        const size_t block_bytes = G * d * block_tokens * (bf16 ? 2 : 4);
        require(block_tokens % 16 == 0 && block_tokens > 0 && block_tokens <= kMaxBlockTokens,
                "16 must divide the tokens of a block");
        require(keys.shape(1) == block_bytes && values.shape(1) == block_bytes && keys.shape(0) == values.shape(0),
                "the cache does not fit the heads");
        require(x.shape(1) == weights.q.columns && slots.size() == T, "x or slots does not fit");
        require(
            cosines.shape(0) == T && sines.shape(0) == T && cosines.shape(1) == d / 2 && sines.shape(1) == d / 2,
            "the angles are not [T, d / 2]");
        require(spans.shape(1) == 3 && tables.shape(0) == spans.shape(0),
                "spans are not [S, 3], tables not [S, N]");
        const size_t num_blocks = keys.shape(0), width = tables.shape(1);
        for (size_t t = 0; t < T; ++t) {
            const int64_t slot = slots.data()[t];
            require(slot >= 0 && static_cast<size_t>(slot) < num_blocks * block_tokens,
                    "a slot is not in the cache");
        }
        Step step{T, {}, slots.data(), cosines.data(), sines.data()};
        size_t next_row = 0;
        for (size_t s = 0; s < spans.shape(0); ++s) {
            const int32_t* span = spans.data() + 3 * s;
            const int32_t* table = tables.data() + s * width;
            require(span[0] >= 0 && static_cast<size_t>(span[0]) == next_row && span[1] > 0 && span[2] >= 0,
                    "the spans do not cover the batch one after another");
            next_row += static_cast<size_t>(span[1]);
            const size_t length = static_cast<size_t>(span[2]) + static_cast<size_t>(span[1]);
            const size_t used = (length + block_tokens - 1) / block_tokens;
            require(used <= width, "a block table is too short");
            for (size_t i = 0; i < used; ++i) {
                require(table[i] >= 0 && static_cast<size_t>(table[i]) < num_blocks,
                        "a block is not in the cache");
            }
            step.spans.push_back(
                {static_cast<size_t>(span[0]), static_cast<size_t>(span[1]), static_cast<size_t>(span[2]), table});
        }
        require(next_row == T, "the spans do not cover the batch");
        const Cache cache{keys.data(), values.data(), bf16, G, d, block_tokens};
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::attention(weights, cache, step, x.data());
    }

    void route(Vector norm, float eps, const BoundMatrix& router, bool normalize, ConstFloats x, Floats h,
               Array<int32_t, 2> ids, Floats weights) {
        const size_t T = x.shape(0), D = router.columns;
        require(norm.size() == D && x.shape(1) == D && h.shape(0) == T && h.shape(1) == D,
                "norm, x or h does not fit");
        require(ids.shape(0) == T && weights.shape(0) == T && ids.shape(1) == weights.shape(1), "not [T, K]");
        require(ids.shape(1) >= 1 && ids.shape(1) <= std::min(router.rows, kMaxTopK), "top_k is out of range");
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::route(norm.data(), eps, router, ids.shape(1), normalize, x.data(), T, h.data(), ids.data(),
                       weights.data());
    }

    void norm(Vector weight, float eps, ConstFloats x, Floats h) {
        require(x.shape(1) == weight.size() && h.shape(0) == x.shape(0) && h.shape(1) == x.shape(1),
                "h does not fit");
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::norm(weight.data(), eps, x.data(), x.shape(0), x.shape(1), h.data());
    }

    void moe(const BoundExperts& bound, ConstFloats h, Array<const int32_t, 2> ids, ConstFloats weights,
             Floats x) {
        check_tokens(bound, h, ids);
        check_output(weights, x, h.shape(0), ids.shape(1), h.shape(1));
        std::vector<int32_t> used(ids.data(), ids.data() + ids.size());
        std::sort(used.begin(), used.end());
        used.erase(std::unique(used.begin(), used.end()), used.end());
        if (used.front() < 0) used.erase(used.begin());
        const std::vector<const Expert*> experts = at(bound, used);
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        begun_ = nullptr;
        Runtime::moe_begin(bound.places.size(), bound.like, h.data(), ids.data(), h.shape(0), ids.shape(1));
        Runtime::moe_compute(experts.data(), used.data(), used.size());
        join();
        Runtime::moe_finish(weights.data(), x.data());
    }

    void moe_begin(const BoundExperts& bound, ConstFloats h, Array<const int32_t, 2> ids) {
        check_tokens(bound, h, ids);
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::moe_begin(bound.places.size(), bound.like, h.data(), ids.data(), h.shape(0), ids.shape(1));
        begun_ = &bound;
        begun_tokens_ = h.shape(0);
        begun_top_k_ = ids.shape(1);
    }

    void moe_compute(const BoundExperts& bound, const std::vector<int32_t>& ids) {
        const std::vector<const Expert*> experts = at(bound, ids);
        {
            const nb::gil_scoped_release release;
            const Turn turn(*this);
            require(ids.empty() || begun_ == &bound, "moe_begin was not called for these experts");
            Runtime::moe_compute(experts.data(), ids.data(), ids.size());
        }
        computed_ = nb::find(bound);
    }

    void moe_finish(const BoundExperts& bound, ConstFloats weights, Floats x) {
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        require(begun_ == &bound, "moe_begin was not called for these experts");
        check_output(weights, x, begun_tokens_, begun_top_k_, bound.like.gate.columns);
        begun_ = nullptr;
        Runtime::moe_finish(weights.data(), x.data());
    }

    void draw(ConstFloats logits, Vector temperatures, Ids top_k, Vector top_p, Vector min_p,
              Array<const double, 1> uniforms, Array<int32_t, 1> ids) {
        const size_t S = logits.shape(0);
        require(logits.shape(1) > 0 && temperatures.size() == S && top_k.size() == S && top_p.size() == S &&
                    min_p.size() == S && uniforms.size() == S && ids.size() == S,
                "logits are not [S, V], or something else is not [S]");
        std::vector<Filter> filters(S);
        for (size_t i = 0; i < S; ++i) filters[i] = {top_k.data()[i], top_p.data()[i], min_p.data()[i]};
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        Runtime::draw(logits.data(), S, logits.shape(1), temperatures.data(), filters.data(), uniforms.data(),
                      ids.data());
    }

    uint64_t read(Bytes data) {
        const nb::gil_scoped_release release;
        const Turn turn(*this);
        return Runtime::read(data.data(), data.size());
    }

private:
    static void check_tokens(const BoundExperts& bound, ConstFloats h, Array<const int32_t, 2> ids) {
        require(h.shape(0) > 0 && h.shape(1) == bound.like.gate.columns, "h is not [T, D]");
        require(ids.shape(0) == h.shape(0), "ids are not [T, K]");
        require(ids.shape(1) >= 1 && ids.shape(1) <= kMaxTopK, "top_k is out of range");
        for (size_t i = 0; i < ids.size(); ++i) {
            require(ids.data()[i] >= -1 && ids.data()[i] < static_cast<int64_t>(bound.places.size()),
                    "an expert id is out of range");
        }
    }

    static void check_output(ConstFloats weights, Floats x, size_t num_tokens, size_t top_k, size_t hidden_size) {
        require(weights.shape(0) == num_tokens && weights.shape(1) == top_k, "weights are not [T, K]");
        require(x.shape(0) == num_tokens && x.shape(1) == hidden_size, "x is not [T, D]");
    }

    static std::vector<const Expert*> at(const BoundExperts& bound, const std::vector<int32_t>& ids) {
        std::vector<const Expert*> experts;
        for (const int32_t id : ids) experts.push_back(bound.at(id));
        return experts;
    }

    // Python's threads take turns, since operations share their threads and their memory, and each of them begins
    // when what moe_compute began is done.
    class Turn {
    public:
        explicit Turn(BoundRuntime& runtime) : lock_(runtime.mutex_) { runtime.join(); }

    private:
        std::lock_guard<std::mutex> lock_;
    };

    std::mutex mutex_;
    nb::object computed_;  // the experts that may still be computed: they must not be freed meanwhile
    const BoundExperts* begun_ = nullptr;  // whose moe_begin is to be finished; only compared
    size_t begun_tokens_ = 0, begun_top_k_ = 0;
};

BoundRuntime* make_runtime(const std::string& level, int num_threads, bool pin) {
    require(num_threads >= 1 && num_threads <= 1024, "num_threads is not from 1 to 1024");
    for (const Kernels* kernels : compiled_levels()) {
        if (level == kernels->name) {
            require(works(*kernels), "this machine does not run that level");
            return new BoundRuntime(*kernels, num_threads, pin);
        }
    }
    throw std::invalid_argument("there is no such level");
}

std::vector<std::string> working_levels() {
    std::vector<std::string> names;
    for (const Kernels* kernels : compiled_levels()) {
        if (works(*kernels)) names.emplace_back(kernels->name);
    }
    return names;
}

}  // namespace
}  // namespace localmoe

NB_MODULE(_cpu, m) {
    using namespace localmoe;
    m.doc() = "Kernels for the CPU.";
    m.def("levels", working_levels,
          "Levels of instructions that this machine was seen to compute with, lowest first.");
    m.attr("MAX_TOP_K") = kMaxTopK;
    nb::class_<BoundMatrix>(m, "Matrix")
        .def(nb::init<const std::string&, size_t, size_t, Bytes, Bytes, float>(), "format"_a, "rows"_a,
             "columns"_a, "values"_a.noconvert(), "scales"_a.noconvert(), "tensor_scale"_a);
    nb::class_<BoundAttention>(m, "Attention")
        .def(nb::init<Vector, const BoundMatrix&, const BoundMatrix&, const BoundMatrix&, const BoundMatrix&,
                      std::optional<Vector>, std::optional<Vector>, size_t, size_t, float>(),
             "norm"_a.noconvert(), "q"_a, "k"_a, "v"_a, "o"_a, "q_norm"_a.none().noconvert(),
             "k_norm"_a.none().noconvert(), "num_heads"_a, "num_kv_heads"_a, "eps"_a);
    nb::class_<BoundExperts>(m, "Experts")
        .def(nb::init<const std::string&, size_t, size_t, size_t>(), "format"_a, "num_experts"_a, "hidden_size"_a,
             "expert_size"_a)
        .def("place", &BoundExperts::place, "id"_a, "gate"_a, "up"_a, "down"_a)
        .def("remove", &BoundExperts::remove, "id"_a);
    nb::class_<BoundRuntime>(m, "Runtime")
        .def(nb::new_(&make_runtime), "level"_a, "num_threads"_a, "pin"_a = false)
        .def("embed", &BoundRuntime::embed, "matrix"_a, "ids"_a.noconvert(), "out"_a.noconvert())
        .def("linear", &BoundRuntime::linear, "matrix"_a, "x"_a.noconvert(), "out"_a.noconvert())
        .def("logits", &BoundRuntime::logits, "norm"_a.noconvert(), "eps"_a, "head"_a, "x"_a.noconvert(),
             "out"_a.noconvert())
        .def("attention", &BoundRuntime::attention, "weights"_a.noconvert(), "keys"_a.noconvert(),
             "values"_a.noconvert(), "bf16"_a, "block_tokens"_a, "spans"_a.noconvert(), "tables"_a.noconvert(),
             "slots"_a.noconvert(), "cosines"_a.noconvert(), "sines"_a.noconvert(), "x"_a.noconvert())
        .def("route", &BoundRuntime::route, "norm"_a.noconvert(), "eps"_a, "router"_a, "normalize"_a,
             "x"_a.noconvert(), "h"_a.noconvert(), "ids"_a.noconvert(), "weights"_a.noconvert())
        .def("norm", &BoundRuntime::norm, "weight"_a.noconvert(), "eps"_a, "x"_a.noconvert(), "h"_a.noconvert())
        .def("moe", &BoundRuntime::moe, "experts"_a, "h"_a.noconvert(), "ids"_a.noconvert(),
             "weights"_a.noconvert(), "x"_a.noconvert())
        .def("moe_begin", &BoundRuntime::moe_begin, "experts"_a, "h"_a.noconvert(), "ids"_a.noconvert())
        .def("moe_compute", &BoundRuntime::moe_compute, "experts"_a, "ids"_a)
        .def("moe_finish", &BoundRuntime::moe_finish, "experts"_a, "weights"_a.noconvert(), "x"_a.noconvert())
        .def("draw", &BoundRuntime::draw, "logits"_a.noconvert(), "temperatures"_a.noconvert(),
             "top_k"_a.noconvert(), "top_p"_a.noconvert(), "min_p"_a.noconvert(), "uniforms"_a.noconvert(),
             "ids"_a.noconvert())
        .def("read", &BoundRuntime::read, "data"_a.noconvert());
    bind_disk(m);
}
