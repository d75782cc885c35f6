#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

namespace localmoe {
namespace {

// A few microseconds, as long as most waits last, and then some fifty more in which whoever else wants the
// processor gets it: it may be the very thread that is waited for.
constexpr int kSpins = 200;
constexpr int kYields = 200;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Returns once `word` is no longer `old`.
void wait_while(const std::atomic<uint32_t>& word, uint32_t old) {
    for (int i = 0; i < kSpins + kYields; ++i) {
        if (word.load(std::memory_order_acquire) != old) return;
        i < kSpins ? pause() : static_cast<void>(sched_yield());
    }
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

std::vector<int> read_allowed_processors() {
    std::vector<int> processors;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int i = 0; i < CPU_SETSIZE; ++i) {
            if (CPU_ISSET(i, &set)) processors.push_back(i);
        }
    }
    return processors;
}

// Asked once: pinning narrows what the calling thread may use, and what its children inherit.
const std::vector<int>& allowed_processors() {
    static const std::vector<int> processors = read_allowed_processors();
    return processors;
}

void pin_to(int processor) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    // A refusal costs speed only.
    (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

}  // namespace

Pool::Pool(int num_threads, bool pin) : num_threads_(num_threads) {
    if (pin) processors_ = allowed_processors();
    try {
        for (int thread = 1; thread < num_threads; ++thread)
            threads_.emplace_back([this, thread] { work(thread); });
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stopping_ = true;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Pool::begin(Entry entry, void* context) {
    if (!processors_.empty() && !caller_pinned_) {
        pin_to(processors_[0]);
        caller_pinned_ = true;
    }
    entry_ = entry;
    context_ = context;
    begun_ = true;
    if (num_threads_ > 1) {
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }
}

void Pool::join() {
    if (!begun_) return;
    entry_(context_, 0);
    barrier();
    begun_ = false;
}

void Pool::work(int thread) {
    if (!processors_.empty()) pin_to(processors_[thread % processors_.size()]);
    for (uint32_t seen = 0;;) {
        wait_while(epoch_, seen);
        ++seen;
        if (stopping_) return;
        entry_(context_, thread);
        barrier();
    }
}

void Pool::barrier() {
    if (num_threads_ == 1) return;
    const uint32_t epoch = barrier_epoch_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(num_threads_)) {
        arrived_.store(0, std::memory_order_relaxed);
        barrier_epoch_.fetch_add(1, std::memory_order_release);
        barrier_epoch_.notify_all();
    } else {
        wait_while(barrier_epoch_, epoch);
    }
}

void Remaining::wait() const {
    for (uint32_t count; (count = count_.load(std::memory_order_acquire)) != 0;) wait_while(count_, count);
}

}  // namespace localmoe
