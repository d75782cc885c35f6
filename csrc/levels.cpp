#include "levels.hpp"

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstring>
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

sigjmp_buf illegal;

// Calls function; false if an instruction in it is refused.
template <class Function>
bool survives(Function&& function) {
    static std::mutex mutex;  // the handler is the process's
    const std::lock_guard lock(mutex);
    struct sigaction action = {}, before;
    action.sa_handler = [](int) { siglongjmp(illegal, 1); };
    sigemptyset(&action.sa_mask);
    sigaction(SIGILL, &action, &before);
    const bool survived = sigsetjmp(illegal, 1) == 0;
    if (survived) function();
    sigaction(SIGILL, &before, nullptr);
    return survived;
}

// A product of 16 rows, 64 columns and 16 tokens, of small integers and so exact in every format.
bool multiplies(const Kernels& kernels, Format format) {
    constexpr size_t kRows = 16, kColumns = 64, kTokens = 16;
    std::vector<uint8_t> values(kRows * kColumns * 4), scales(kColumns * 2 * kRows);
    std::vector<float> x(kTokens * kColumns), out(kTokens * kRows);
    const Matrix matrix{format, kRows, kColumns, values.data(), scales.data(), 1.0f};
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(i * 37 + i / 64 * 11);
    if (format == Format::kInt8) {
        for (size_t i = 0; i < scales.size(); i += 2) scales[i + 1] = 0x3C;  // 1 in float16
    } else {
        std::memset(scales.data(), format == Format::kMxfp4 ? 127 : 0x38, scales.size());  // 1
    }
    for (size_t t = 0; t < kTokens; ++t) {
        for (size_t c = 0; c < kColumns; ++c) {
            x[t * kColumns + c] = c % 32 == 0 ? 127.0f : static_cast<float>((t * 5 + c * 7) % 255) - 127.0f;
        }
    }
    Runtime runtime(kernels, 1, false);
    runtime.linear(matrix, x.data(), kTokens, out.data());
    std::vector<float> weights(kRows * kColumns);
    for (int32_t row = 0; row < static_cast<int32_t>(kRows); ++row) {
        runtime.embed(matrix, &row, 1, weights.data() + static_cast<size_t>(row) * kColumns);
    }
    for (size_t t = 0; t < kTokens; ++t) {
        for (size_t row = 0; row < kRows; ++row) {
            float expected = 0.0f;
            for (size_t c = 0; c < kColumns; ++c) expected += weights[row * kColumns + c] * x[t * kColumns + c];
            if (std::fabs(out[t * kRows + row] - expected) > 1e-5f * std::fabs(expected) + 1e-2f) return false;
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
    if (!announced(kernels.name)) return false;
    bool right = false;
    const bool survived = survives([&] {
        right = multiplies(kernels, Format::kMxfp4) && multiplies(kernels, Format::kNvfp4) &&
                multiplies(kernels, Format::kInt8);
    });
    return survived && right;
}

}  // namespace localmoe
