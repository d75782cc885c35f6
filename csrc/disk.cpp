#include "disk.hpp"

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <unordered_set>

namespace localmoe {
namespace {

// Direct reads begin at multiples of this.
constexpr uint64_t kAlignment = 4096;
// EAGAIN and the like are rare and pass; a kernel that says nothing else is broken.
constexpr int kMaxRetries = 100;
// A wait for the kernel is at most this long, so that a piece it could not take yet is offered again.
constexpr std::chrono::milliseconds kLongestSleep{100};

bool is_transient(int error) {
    // ECANCELED: the thread that submitted the piece has ended.
    return error == EINTR || error == EAGAIN || error == ECANCELED;
}

}  // namespace

DiskReader::DiskReader(std::vector<int> file_descriptors, uint32_t queue_depth, DiskMethod method,
                       size_t piece_bytes)
    : file_descriptors_(std::move(file_descriptors)),
      piece_bytes_(piece_bytes),
      backend_(method == DiskMethod::kIoUring ? make_io_uring(queue_depth) : make_disk_threads(queue_depth)),
      slots_(queue_depth) {
    for (uint32_t i = queue_depth; i-- > 0;) free_slots_.push_back(i);
    results_.reserve(queue_depth);
}

DiskReader::~DiskReader() {
    try {
        close();
    } catch (const std::exception&) {
        // The kernel's queue is gone; there is nobody to tell and nothing left to wait for.
    }
}

void DiskReader::require_open() const {
    if (closing_) throw std::logic_error("the reader is closed");
}

int DiskReader::register_buffers(const std::vector<MemorySpan>& spans) {
    const std::lock_guard lock(mutex_);
    require_open();
    if (!is_idle()) throw std::logic_error("reads are under way");
    return backend_->register_buffers(spans);
}

void DiskReader::submit(const std::vector<DiskRead>& reads) {
    const std::lock_guard lock(mutex_);
    require_open();
    if (reads.empty()) return;
    if (is_idle()) busy_since_ = Clock::now();
    std::list<Read> added;
    for (const DiskRead& read : reads) added.push_back({read});
    waiting_.splice(waiting_.end(), added);
    reap();
    feed();
}

std::vector<DiskResult> DiskReader::wait(size_t min_completed, std::chrono::nanoseconds timeout) {
    const auto deadline = Clock::now() + timeout;
    const std::unique_lock waiting(wait_mutex_, deadline);
    if (!waiting) return {};
    std::unique_lock lock(mutex_);
    require_open();
    for (;;) {
        reap();
        feed();
        const auto left = std::chrono::nanoseconds(deadline - Clock::now());
        if (finished_.size() >= min_completed || is_idle() || left.count() <= 0)
            return std::exchange(finished_, {});
        lock.unlock();
        backend_->wait(std::min<std::chrono::nanoseconds>(left, kLongestSleep));
        lock.lock();
    }
}

std::vector<int64_t> DiskReader::cancel(const std::vector<int64_t>& tags) {
    const std::lock_guard lock(mutex_);
    require_open();
    const std::unordered_set<int64_t> unwanted(tags.begin(), tags.end());
    std::vector<int64_t> dropped;
    const bool was_idle = is_idle();
    for (auto read = waiting_.begin(); read != waiting_.end();) {
        if (read->cut_bytes == 0 && unwanted.contains(read->what.tag)) {
            dropped.push_back(read->what.tag);
            read = waiting_.erase(read);
        } else {
            ++read;
        }
    }
    if (!was_idle && is_idle()) busy_ += Clock::now() - busy_since_;
    return dropped;
}

void DiskReader::close() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        for (auto read = waiting_.begin(); read != waiting_.end();) {
            const auto next = std::next(read);
            read->status = read->status ? read->status : ECANCELED;
            if (read->num_pieces == 0) {
                finish(read);
            } else {
                run(read);
            }
            read = next;
        }
    }
    const std::lock_guard waiting(wait_mutex_);  // a thread that waits leaves when the last read has ended
    std::unique_lock lock(mutex_);
    while (backend_) {
        reap();
        if (running_.empty()) {
            backend_.reset();
            return;
        }
        backend_->submit();
        lock.unlock();
        backend_->wait(kLongestSleep);
        lock.lock();
    }
}

// Gives the kernel what it may hold.
void DiskReader::feed() {
    while (!free_slots_.empty() && !waiting_.empty()) {
        const auto read = waiting_.begin();
        const DiskRead& what = read->what;
        if (read->status == 0) {
            const size_t num_bytes = std::min<uint64_t>(piece_bytes_, what.num_bytes - read->cut_bytes);
            const uint32_t index = free_slots_.back();
            free_slots_.pop_back();
            slots_[index] = {read,
                             {file_descriptors_[what.file], what.offset + read->cut_bytes, num_bytes,
                              what.address + read->cut_bytes},
                             0,
                             0,
                             0};
            read->cut_bytes += num_bytes;
            ++read->num_pieces;
            start(index);
        }
        if (read->status == 0 && read->cut_bytes < what.num_bytes) continue;
        if (read->num_pieces > 0) {
            run(read);
        } else {
            finish(read);
        }
    }
    backend_->submit();
}

void DiskReader::reap() {
    if (!backend_) return;
    results_.clear();
    backend_->collect(results_);
    for (const auto& [index, result] : results_) handle(index, result);
}

void DiskReader::handle(uint32_t index, int64_t result) {
    Slot& slot = slots_[index];
    Read& read = *slot.read;
    if (result < 0) {
        const int error = static_cast<int>(-result);
        if (is_transient(error) && read.status == 0 && ++slot.num_retries <= kMaxRetries) return start(index);
        read.status = read.status ? read.status : error;
        return release(index);
    }
    const size_t end = slot.begin_bytes + static_cast<size_t>(result);
    if (end < slot.piece.num_bytes && read.status == 0) {
        if (end <= slot.done_bytes) {
            read.status = kEndOfFile;
            return release(index);
        }
        // A direct read must begin aligned, so a few bytes may be read twice. At the end of the file that brings
        // nothing new, which is how the end is known.
        const uint64_t aligned = (slot.piece.offset + end) / kAlignment * kAlignment;
        slot.begin_bytes = aligned > slot.piece.offset ? aligned - slot.piece.offset : 0;
        slot.done_bytes = end;
        return start(index);
    }
    release(index);
}

void DiskReader::start(uint32_t index) {
    const Slot& slot = slots_[index];
    DiskPiece rest = slot.piece;
    rest.offset += slot.begin_bytes;
    rest.num_bytes -= slot.begin_bytes;
    rest.address += slot.begin_bytes;
    backend_->start(index, rest);
}

void DiskReader::release(uint32_t index) {
    const auto read = slots_[index].read;
    free_slots_.push_back(index);
    --read->num_pieces;
    if (read->num_pieces == 0 && (read->is_running || read->status)) finish(read);
}

// Nothing more of it will be given to the kernel.
void DiskReader::run(ReadIterator read) {
    read->is_running = true;
    running_.splice(running_.end(), waiting_, read);
}

void DiskReader::finish(ReadIterator read) {
    finished_.push_back({read->what.tag, read->status});
    if (read->status == 0) {
        ++num_reads_;
        bytes_read_ += read->what.num_bytes;
    }
    (read->is_running ? running_ : waiting_).erase(read);
    if (is_idle()) busy_ += Clock::now() - busy_since_;
}

size_t DiskReader::in_flight() const {
    const std::lock_guard lock(mutex_);
    return waiting_.size() + running_.size();
}

uint64_t DiskReader::num_reads() const {
    const std::lock_guard lock(mutex_);
    return num_reads_;
}

uint64_t DiskReader::bytes_read() const {
    const std::lock_guard lock(mutex_);
    return bytes_read_;
}

double DiskReader::busy_s() const {
    const std::lock_guard lock(mutex_);
    const auto busy = busy_ + (is_idle() ? Clock::duration{} : Clock::now() - busy_since_);
    return std::chrono::duration<double>(busy).count();
}

}  // namespace localmoe
