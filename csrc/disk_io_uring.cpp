// Reads through io_uring, spoken to directly: the kernel's header is all it takes. What the calls and the rings
// mean is in io_uring(7), io_uring_enter(2) and io_uring_register(2).
#include "disk.hpp"

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif

#include <algorithm>
#include <cerrno>
#include <system_error>

#if defined(IORING_FEAT_EXT_ARG)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#endif

namespace localmoe {

#if defined(IORING_FEAT_EXT_ARG) && defined(__NR_io_uring_setup)
namespace {

[[noreturn]] void fail(const char* what, int error = errno) {
    throw std::system_error(error, std::generic_category(), what);
}

struct Mapping {
    Mapping(int ring, size_t size, off_t offset) : num_bytes(size) {
        address = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, offset);
        if (address == MAP_FAILED) fail("mapping the rings of io_uring");
    }
    ~Mapping() { munmap(address, num_bytes); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    template <class T>
    T* at(uint32_t offset) const {
        return reinterpret_cast<T*>(static_cast<unsigned char*>(address) + offset);
    }

    void* address;
    size_t num_bytes;
};

struct Descriptor {
    explicit Descriptor(int number_) : number(number_) {
        if (number < 0) fail("io_uring_setup");
    }
    ~Descriptor() { ::close(number); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    int number;
};

class IoUring : public DiskBackend {
public:
    explicit IoUring(uint32_t queue_depth)
        : ring_(static_cast<int>(syscall(__NR_io_uring_setup, queue_depth, &params_))),
          rings_(ring_.number, check_rings_bytes(), IORING_OFF_SQ_RING),
          entries_(ring_.number, params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES) {
        sq_head_ = rings_.at<uint32_t>(params_.sq_off.head);
        sq_tail_ = rings_.at<uint32_t>(params_.sq_off.tail);
        sq_mask_ = *rings_.at<uint32_t>(params_.sq_off.ring_mask);
        cq_head_ = rings_.at<uint32_t>(params_.cq_off.head);
        cq_tail_ = rings_.at<uint32_t>(params_.cq_off.tail);
        cq_mask_ = *rings_.at<uint32_t>(params_.cq_off.ring_mask);
        completions_ = rings_.at<io_uring_cqe>(params_.cq_off.cqes);
        auto* order = rings_.at<uint32_t>(params_.sq_off.array);
        for (uint32_t i = 0; i < params_.sq_entries; ++i) order[i] = i;
    }

    int register_buffers(const std::vector<MemorySpan>& spans) override {
        if (!registered_.empty()) {
            if (syscall(__NR_io_uring_register, ring_.number, IORING_UNREGISTER_BUFFERS, nullptr, 0)) return errno;
            registered_.clear();
        }
        std::vector<iovec> buffers;
        for (const MemorySpan& span : spans) {
            for (size_t begin = 0; begin < span.num_bytes; begin += kMaxBufferBytes)
                buffers.push_back({span.address + begin, std::min(kMaxBufferBytes, span.num_bytes - begin)});
        }
        std::sort(buffers.begin(), buffers.end(),
                  [](const iovec& a, const iovec& b) { return a.iov_base < b.iov_base; });
        if (buffers.empty()) return 0;
        if (syscall(__NR_io_uring_register, ring_.number, IORING_REGISTER_BUFFERS, buffers.data(),
                    buffers.size()) < 0)
            return errno;
        registered_ = std::move(buffers);
        return 0;
    }

    void start(uint32_t slot, const DiskPiece& piece) override {
        const uint32_t tail = *sq_tail_;  // ours alone; never full, as there are no fewer entries than slots
        io_uring_sqe& entry = *entries_.at<io_uring_sqe>((tail & sq_mask_) * sizeof(io_uring_sqe));
        const int buffer = find_buffer(piece);
        entry = {};
        entry.opcode = buffer < 0 ? IORING_OP_READ : IORING_OP_READ_FIXED;
        entry.fd = piece.file_descriptor;
        entry.off = piece.offset;
        entry.addr = reinterpret_cast<uint64_t>(piece.address);
        entry.len = static_cast<uint32_t>(piece.num_bytes);
        entry.buf_index = static_cast<uint16_t>(std::max(buffer, 0));
        entry.user_data = slot;
        __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    }

    void submit() override {
        while (const uint32_t num_entries = *sq_tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE)) {
            if (syscall(__NR_io_uring_enter, ring_.number, num_entries, 0, 0, nullptr, 0) >= 0) continue;
            // Short of memory: offered again after the next wait.
            if (errno == EAGAIN || errno == EBUSY || errno == ENOMEM) return;
            if (errno != EINTR) fail("io_uring_enter");
        }
    }

    void collect(std::vector<std::pair<uint32_t, int64_t>>& results) override {
        uint32_t head = *cq_head_;  // ours alone
        const uint32_t tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
        for (; head != tail; ++head) {
            const io_uring_cqe& completion = completions_[head & cq_mask_];
            results.emplace_back(static_cast<uint32_t>(completion.user_data), completion.res);
        }
        __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    }

    void wait(std::chrono::nanoseconds timeout) override {
        __kernel_timespec time{timeout.count() / 1'000'000'000, timeout.count() % 1'000'000'000};
        io_uring_getevents_arg argument{};
        argument.ts = reinterpret_cast<uint64_t>(&time);
        const unsigned flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG;
        if (syscall(__NR_io_uring_enter, ring_.number, 0, 1, flags, &argument, sizeof argument) >= 0) return;
        if (errno != EINTR && errno != ETIME && errno != EAGAIN && errno != EBUSY) fail("io_uring_enter");
    }

private:
    static constexpr size_t kMaxBufferBytes = size_t{1} << 30;  // the kernel's limit

    size_t check_rings_bytes() const {
        constexpr uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
        if ((params_.features & needed) != needed) fail("io_uring of this kernel is too old", ENOSYS);
        return std::max<size_t>(params_.sq_off.array + params_.sq_entries * sizeof(uint32_t),
                                params_.cq_off.cqes + params_.cq_entries * sizeof(io_uring_cqe));
    }

    // The registered buffer that the piece lies wholly in, or -1.
    int find_buffer(const DiskPiece& piece) const {
        const auto after = std::upper_bound(
            registered_.begin(), registered_.end(), piece.address,
            [](const unsigned char* address, const iovec& buffer) { return address < buffer.iov_base; });
        if (after == registered_.begin()) return -1;
        const iovec& buffer = *std::prev(after);
        const auto* end = static_cast<const unsigned char*>(buffer.iov_base) + buffer.iov_len;
        if (piece.address + piece.num_bytes > end) return -1;
        return static_cast<int>(std::prev(after) - registered_.begin());
    }

    io_uring_params params_{};
    Descriptor ring_;
    Mapping rings_, entries_;
    uint32_t *sq_head_, *sq_tail_, *cq_head_, *cq_tail_;
    uint32_t sq_mask_, cq_mask_;
    io_uring_cqe* completions_;
    std::vector<iovec> registered_;  // by address
};

}  // namespace

std::unique_ptr<DiskBackend> make_io_uring(uint32_t queue_depth) { return std::make_unique<IoUring>(queue_depth); }

#else

std::unique_ptr<DiskBackend> make_io_uring(uint32_t) {
    throw std::system_error(ENOSYS, std::generic_category(), "built without io_uring");
}

#endif

}  // namespace localmoe
