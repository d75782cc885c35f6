// Threads that compute one operation together.
//
// `run` hands the same function to every thread, the caller being thread 0, and returns when all have left it.
// Inside, threads take work items from shared counters, so that a thread the system holds up delays nobody by more
// than one item, and meet at barriers between the phases of an operation. Phases last microseconds: who waits
// spins first and sleeps in the kernel after that, so that an idle engine costs nothing.
//
// `begin` hands a function to the other threads and returns; the caller does something else meanwhile, and takes
// part from `join` on, which must come before anything else is run. Such a function has no barriers, since one
// thread may come late: its phases end when their items are done, whoever did them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace localmoe {

class Pool {
public:
    // num_threads >= 1. With `pin`, thread i stays on the i-th processor the process may use; the caller is not
    // pinned until it first runs something.
    Pool(int num_threads, bool pin);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Calls function(thread index) on all threads at once. What it needs is allocated before: an exception in it,
    // on whichever thread, would leave the others waiting, and ends the process.
    template <class Function>
    void run(Function&& function) {
        begin([](void* context, int thread) noexcept { (*static_cast<Function*>(context))(thread); }, &function);
        join();
    }

    using Entry = void (*)(void* context, int thread) noexcept;

    // Calls entry(context, thread index) on all threads but the caller.
    void begin(Entry entry, void* context);
    // Calls it on the caller, too, and returns when all have left it; does nothing where nothing was begun.
    void join();

    // Within `run`: waits until every thread has come here.
    void barrier();

private:
    void stop();
    void work(int thread);

    const int num_threads_;
    std::vector<int> processors_;  // empty: not pinned
    bool caller_pinned_ = false;
    Entry entry_ = nullptr;
    void* context_ = nullptr;
    bool begun_ = false;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> barrier_epoch_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;
};

// How much of a phase is not done yet, for those who need all of it.
class Remaining {
public:
    explicit Remaining(size_t count) : count_(static_cast<uint32_t>(count)) {}

    void done(size_t count = 1) {
        const auto less = static_cast<uint32_t>(count);
        if (count_.fetch_sub(less, std::memory_order_acq_rel) == less) count_.notify_all();
    }

    // Waits until all is done.
    void wait() const;

private:
    alignas(64) std::atomic<uint32_t> count_;
};

// Hands out items 0..count-1 of one phase. Each phase of an operation has a counter of its own, made before `run`.
class Items {
public:
    explicit Items(size_t count) : count_(count) {}

    // The next item, or false when all are taken.
    bool take(size_t& item) {
        item = next_.fetch_add(1, std::memory_order_relaxed);
        return item < count_;
    }

private:
    const size_t count_;
    alignas(64) std::atomic<size_t> next_{0};
};

// Hands out the row groups 0..count-1 of matrices in runs. A run is read from memory as one stream, and long
// streams are what prefetching is good at; runs get shorter towards the end, so that the threads finish together.
class Runs {
public:
    Runs(size_t count, int num_threads) : count_(count), parts_(2 * static_cast<size_t>(num_threads)) {}

    // The next run [first, last), or false when all are taken.
    bool take(size_t& first, size_t& last) {
        first = next_.load(std::memory_order_relaxed);
        do {
            if (first >= count_) return false;
            const size_t left = count_ - first;
            last = first + std::min(left, std::max(left / parts_, kLeastGroups));
        } while (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
        return true;
    }

private:
    static constexpr size_t kLeastGroups = 4;

    const size_t count_;
    const size_t parts_;
    alignas(64) std::atomic<size_t> next_{0};
};

}  // namespace localmoe
