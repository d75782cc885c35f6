#include "levels.hpp"

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <map>
#include <mutex>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "runtime.hpp"

namespace localmoe {
namespace {

#if defined(__x86_64__)
bool announced(const std::string& level) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return false;
    if (level == "avx2") return true;
    if (level == "avx_vnni") return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni")) {
        return false;
    }
    if (level == "avx512_vnni") return true;
#ifdef LOCALMOE_EMULATE_AMX
    return true;
#else
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 24) || !(d & 1u << 25)) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#else
bool announced(const std::string&) { return false; }
#endif

thread_local sigjmp_buf illegal;
thread_local bool probing = false;

// Calls function; false if an instruction in it is refused. What it calls may leave nothing to be cleaned up.
template <class Function>
bool survives(Function&& function) {
    static std::mutex mutex;  // the handler is the process's
    const std::lock_guard lock(mutex);
    struct sigaction action = {}, before;
    action.sa_handler = [](int number) {
        if (probing) siglongjmp(illegal, 1);
        // Another thread's own fault.
        std::signal(number, SIG_DFL);
        std::raise(number);
    };
    sigemptyset(&action.sa_mask);
    sigaction(SIGILL, &action, &before);
    const bool survived = sigsetjmp(illegal, 1) == 0;
    probing = survived;
    if (survived) function();
    probing = false;
    sigaction(SIGILL, &before, nullptr);
    return survived;
}

// A product of 16 rows, 64 columns and one token group, of small integers and so exact in every format.
struct Probe {
    static constexpr size_t kRows = 16, kColumns = 64, kBlocks = kColumns / kBlock;

    const Kernels& kernels;
    const Format format;
    const size_t count;
    std::vector<uint8_t> values, scales, scratch;
    std::vector<float> x, token_scales, out;
    std::vector<int8_t> rows, codes;
    std::vector<int32_t> bias, row_bias;

    Probe(const Kernels& k, Format f, size_t n)
        : kernels(k),
          format(f),
          count(n),
          values(kRows * kColumns),
          scales(kColumns * kRows),
          scratch(product_scratch_bytes(kColumns)),
          x(n * kColumns),
          token_scales(n * kBlocks),
          out(n * kRows),
          rows(kColumns),
          codes(kMaxTokenGroup * kColumns),
          bias(n * 2 * kBlocks),
          row_bias(2 * kBlocks) {
        for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(i * 37 + i / 64 * 11);
        for (size_t i = 0; i < scales.size(); ++i) {
            scales[i] = format == Format::kMxfp4 ? 127 : format == Format::kNvfp4 ? 0x38 : i % 2 ? 0x3C : 0;  // 1
        }
        for (size_t i = 0; i < x.size(); ++i) {
            const size_t t = i / kColumns, c = i % kColumns;
            x[i] = c % kBlock == 0 ? 127.0f : static_cast<float>((t * 5 + c * 7) % 255) - 127.0f;
        }
    }

    Matrix matrix() const { return {format, kRows, kColumns, values.data(), scales.data(), 1.0f}; }

    void compute() {
        const size_t spans = kBlocks * spans_per_block(format);
        const bool tiled = kernels.tile_tokens != 0 && count >= kernels.tile_tokens;
        for (size_t t = 0; t < count; ++t) {
            float row_scales[kBlocks];
            kernels.quantize(x.data() + t * kColumns, kColumns, format, rows.data(), row_scales, row_bias.data());
            for (size_t c = 0; c < kColumns; ++c) {
                codes[tiled ? t * kColumns + c : (c / 4 * count + t) * 4 + c % 4] = rows[c];
            }
            for (size_t b = 0; b < kBlocks; ++b) token_scales[b * count + t] = row_scales[b];
            for (size_t s = 0; s < spans; ++s) bias[s * count + t] = row_bias[s];
        }
        const Tokens tokens{
            count,       kColumns, reinterpret_cast<const int32_t*>(codes.data()), token_scales.data(),
            bias.data(), nullptr};
        kernels.product(matrix(), 0, 1, tokens, {out.data(), kRows, false}, scratch.data());
    }

    bool right() const {
        float weights[kColumns];
        for (size_t row = 0; row < kRows; ++row) {
            read_row(matrix(), row, weights);
            for (size_t t = 0; t < count; ++t) {
                float expected = 0.0f;
                for (size_t c = 0; c < kColumns; ++c) expected += weights[c] * x[t * kColumns + c];
                if (!(std::fabs(out[t * kRows + row] - expected) <= 1e-5f * std::fabs(expected) + 1e-2f))
                    return false;
            }
        }
        return true;
    }
};

bool probe(const Kernels& kernels) {
    if (!announced(kernels.name)) return false;
    for (Format format : {Format::kMxfp4, Format::kNvfp4, Format::kInt8}) {
        for (size_t count : {size_t{1}, kernels.token_group}) {
            Probe probe(kernels, format, count);
            if (!survives([&probe] { probe.compute(); }) || !probe.right()) return false;
        }
    }
    return true;
}

}  // namespace

std::vector<const Kernels*> compiled_levels() {
    std::vector<const Kernels*> levels;
#ifdef LOCALMOE_HAVE_AVX2
    levels.push_back(avx2_kernels());
#endif
#ifdef LOCALMOE_HAVE_AVX_VNNI
    levels.push_back(avx_vnni_kernels());
#endif
#ifdef LOCALMOE_HAVE_AVX512_VNNI
    levels.push_back(avx512_vnni_kernels());
#endif
#ifdef LOCALMOE_HAVE_AMX
    levels.push_back(amx_kernels());
#endif
    return levels;
}

bool works(const Kernels& kernels) {
    static std::mutex mutex;
    static std::map<const Kernels*, bool> known;
    const std::lock_guard lock(mutex);
    const auto [place, added] = known.try_emplace(&kernels, false);
    if (added) place->second = probe(kernels);
    return place->second;
}

}  // namespace localmoe
