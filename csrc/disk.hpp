// Reads pieces of files into given memory, many at once, while the caller computes.
//
// A read is cut into pieces, since a disk is fastest with several requests of moderate size before it. At most
// `queue_depth` pieces are with the kernel; the others wait here, in order, and follow whenever `submit` or `wait`
// is called. A piece that comes back short is continued, one that was interrupted is started again.
//
// Memory of a read belongs to the reader from `submit` until `wait` hands the read back, `cancel` drops it, or
// `close` returns; it is not touched at any other time.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace localmoe {

enum class DiskMethod { kIoUring, kThreads };

struct DiskRead {
    int64_t tag;    // the caller's name for it
    uint32_t file;  // index into the reader's files
    uint64_t offset;
    uint64_t num_bytes;
    unsigned char* address;
};

struct DiskResult {
    int64_t tag;
    int status;  // 0, an errno, or kEndOfFile
};

// The file ends before the read does. No errno says so: ENODATA, the nearest, is a disk's medium error.
constexpr int kEndOfFile = -1;

struct MemorySpan {
    unsigned char* address;
    size_t num_bytes;
};

// One request to the kernel.
struct DiskPiece {
    int file_descriptor;
    uint64_t offset;
    size_t num_bytes;
    unsigned char* address;
};

// A way to have the kernel read. All but `wait` are called by one thread at a time.
class DiskBackend {
public:
    virtual ~DiskBackend() = default;
    // 0, or an errno: reads then work as before, without registration.
    virtual int register_buffers(const std::vector<MemorySpan>& spans) = 0;
    // Takes a piece; `slot` < queue_depth comes back with its result. Begins at the next `submit`.
    virtual void start(uint32_t slot, const DiskPiece& piece) = 0;
    virtual void submit() = 0;
    // Appends (slot, number of bytes or negative errno) of the pieces that have ended.
    virtual void collect(std::vector<std::pair<uint32_t, int64_t>>& results) = 0;
    // Sleeps until a piece has ended, at most so long, and perhaps less.
    virtual void wait(std::chrono::nanoseconds timeout) = 0;
};

// Safe to use from several threads. Everything throws std::logic_error after `close`, and std::system_error where
// the kernel refuses what it promised.
class DiskReader {
public:
    // The files stay the caller's, and open until the reader is closed.
    DiskReader(std::vector<int> file_descriptors, uint32_t queue_depth, DiskMethod method, size_t piece_bytes);
    ~DiskReader();
    DiskReader(const DiskReader&) = delete;
    DiskReader& operator=(const DiskReader&) = delete;

    // Pins memory, in place of what was registered before, so that reads into it need not be prepared one by one.
    // Returns 0 or an errno. Not while reads are under way.
    int register_buffers(const std::vector<MemorySpan>& spans);

    void submit(const std::vector<DiskRead>& reads);

    // The reads that have ended since the last call, once they are at least `min_completed`, nothing more is under
    // way, or the time is up.
    std::vector<DiskResult> wait(size_t min_completed, std::chrono::nanoseconds timeout);

    // Drops those of the reads that have not begun, and returns their tags.
    std::vector<int64_t> cancel(const std::vector<int64_t>& tags);

    // Drops what has not begun and waits for what has.
    void close();

    size_t num_files() const { return file_descriptors_.size(); }
    // Reads submitted and not yet seen to have ended.
    size_t in_flight() const;
    // Reads and bytes of reads that have ended well.
    uint64_t num_reads() const;
    uint64_t bytes_read() const;
    // Time with a read under way; ends are noticed by `submit` and `wait`.
    double busy_s() const;

private:
    using Clock = std::chrono::steady_clock;

    struct Read {
        DiskRead what;
        uint64_t cut_bytes = 0;   // given to the kernel so far
        uint32_t num_pieces = 0;  // with the kernel now
        int status = 0;
        bool is_running = false;  // in which list
    };
    using ReadIterator = std::list<Read>::iterator;

    struct Slot {
        ReadIterator read;
        DiskPiece piece;
        size_t begin_bytes;  // of the piece, where the request to the kernel begins
        size_t done_bytes;   // of the piece, read so far
        int num_retries;
    };

    void require_open() const;
    void feed();
    void reap();
    void handle(uint32_t index, int64_t result);
    void start(uint32_t index);
    void release(uint32_t index);
    void run(ReadIterator read);
    void finish(ReadIterator read);
    bool is_idle() const { return waiting_.empty() && running_.empty(); }

    const std::vector<int> file_descriptors_;
    const size_t piece_bytes_;

    std::timed_mutex wait_mutex_;  // one thread waits at a time; taken before mutex_
    mutable std::mutex mutex_;     // guards all that follows, but for backend_->wait
    std::unique_ptr<DiskBackend> backend_;
    bool closing_ = false;
    std::list<Read> waiting_;  // not wholly given to the kernel; of these, only the first in part
    std::list<Read> running_;  // wholly given to the kernel, or as far as they ever will be
    std::vector<Slot> slots_;
    std::vector<uint32_t> free_slots_;
    std::vector<DiskResult> finished_;
    std::vector<std::pair<uint32_t, int64_t>> results_;
    uint64_t num_reads_ = 0;
    uint64_t bytes_read_ = 0;
    Clock::time_point busy_since_;
    Clock::duration busy_{};
};

// Throws std::system_error where the kernel or a container's rules refuse it.
std::unique_ptr<DiskBackend> make_io_uring(uint32_t queue_depth);
std::unique_ptr<DiskBackend> make_disk_threads(uint32_t queue_depth);

}  // namespace localmoe
