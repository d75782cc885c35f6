// Reads with pread in a few threads, where the kernel has no io_uring for us.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <system_error>
#include <thread>

#include "disk.hpp"

namespace localmoe {
namespace {

constexpr uint32_t kMaxThreads = 32;

class DiskThreads : public DiskBackend {
public:
    explicit DiskThreads(uint32_t queue_depth) : jobs_(queue_depth) {
        results_.reserve(queue_depth);
        // Signals are for the interpreter's threads.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (uint32_t i = 0; i < std::min(queue_depth, kMaxThreads); ++i)
                threads_.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            if (threads_.empty()) throw;
            return;  // fewer do it, too
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~DiskThreads() override {
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int register_buffers(const std::vector<MemorySpan>&) override { return ENOTSUP; }

    void start(uint32_t slot, const DiskPiece& piece) override {
        {
            const std::lock_guard lock(mutex_);
            jobs_[(first_ + num_jobs_++) % jobs_.size()] = {slot, piece};
        }
        wake_.notify_one();
    }

    void submit() override {}

    void collect(std::vector<std::pair<uint32_t, int64_t>>& results) override {
        const std::lock_guard lock(mutex_);
        results.insert(results.end(), results_.begin(), results_.end());
        results_.clear();
    }

    void wait(std::chrono::nanoseconds timeout) override {
        std::unique_lock lock(mutex_);
        ended_.wait_for(lock, timeout, [this] { return !results_.empty(); });
    }

private:
    struct Job {
        uint32_t slot;
        DiskPiece piece;
    };

    // Allocates nothing: a thread that died of an exception would leave its piece unanswered.
    void work() noexcept {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return stopping_ || num_jobs_ > 0; });
            if (stopping_) return;
            const Job job = jobs_[first_];
            first_ = (first_ + 1) % jobs_.size();
            --num_jobs_;
            lock.unlock();
            const DiskPiece& piece = job.piece;
            const ssize_t num_bytes =
                pread(piece.file_descriptor, piece.address, piece.num_bytes, static_cast<off_t>(piece.offset));
            const int64_t result = num_bytes < 0 ? -errno : num_bytes;
            lock.lock();
            results_.emplace_back(job.slot, result);
            ended_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, ended_;
    std::vector<Job> jobs_;  // a ring
    size_t first_ = 0;
    size_t num_jobs_ = 0;
    std::vector<std::pair<uint32_t, int64_t>> results_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<DiskBackend> make_disk_threads(uint32_t queue_depth) {
    return std::make_unique<DiskThreads>(queue_depth);
}

}  // namespace localmoe
