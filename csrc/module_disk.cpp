#include "module_disk.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "disk.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace localmoe {
namespace {

constexpr uint32_t kMaxQueueDepth = 1024;
constexpr size_t kMaxPieceBytes = size_t{1} << 30;
constexpr uint64_t kMaxFileBytes = uint64_t{1} << 62;
constexpr double kMaxTimeout_s = 1e6;

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

// Addresses come as integers: whoever submits a read keeps its memory until the read is done.
using ReadTuple = std::tuple<int64_t, uint32_t, uint64_t, uint64_t, uintptr_t>;
using ResultTuple = std::tuple<int64_t, int>;

DiskReader* make_reader(std::vector<int> file_descriptors, uint32_t queue_depth, const std::string& method,
                        size_t piece_bytes) {
    require(!file_descriptors.empty(), "there is no file");
    require(queue_depth >= 1 && queue_depth <= kMaxQueueDepth, "queue_depth is not from 1 to 1024");
    require(piece_bytes >= 4096 && piece_bytes <= kMaxPieceBytes && piece_bytes % 4096 == 0,
            "piece_bytes is not a multiple of 4096 up to 2^30");
    require(method == "io_uring" || method == "threads", "the method is neither io_uring nor threads");
    const auto kind = method == "threads" ? DiskMethod::kThreads : DiskMethod::kIoUring;
    return new DiskReader(std::move(file_descriptors), queue_depth, kind, piece_bytes);
}

int register_buffers(DiskReader& reader, const std::vector<std::pair<uintptr_t, size_t>>& buffers) {
    std::vector<MemorySpan> spans;
    for (const auto& [address, num_bytes] : buffers)
        spans.push_back({reinterpret_cast<unsigned char*>(address), num_bytes});
    return reader.register_buffers(spans);
}

void submit(DiskReader& reader, const std::vector<ReadTuple>& tuples) {
    std::vector<DiskRead> reads;
    reads.reserve(tuples.size());
    for (const auto& [tag, file, offset, num_bytes, address] : tuples) {
        require(file < reader.num_files(), "there is no such file");
        require(num_bytes >= 1 && num_bytes <= kMaxFileBytes && offset <= kMaxFileBytes,
                "a read has from 1 to 2^62 bytes, at an offset up to 2^62");
        require(address != 0, "there is no memory to read into");
        reads.push_back({tag, file, offset, num_bytes, reinterpret_cast<unsigned char*>(address)});
    }
    reader.submit(reads);
}

std::vector<ResultTuple> wait(DiskReader& reader, size_t min_completed, double timeout_s) {
    require(timeout_s >= 0, "timeout_s is negative");
    const std::chrono::duration<double> timeout(std::min(timeout_s, kMaxTimeout_s));
    std::vector<ResultTuple> tuples;
    for (const DiskResult& result :
         reader.wait(min_completed, std::chrono::duration_cast<std::chrono::nanoseconds>(timeout)))
        tuples.emplace_back(result.tag, result.status);
    return tuples;
}

}  // namespace

void bind_disk(nb::module_& m) {
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    m.attr("END_OF_FILE") = kEndOfFile;
    nb::class_<DiskReader>(m, "DiskReader")
        .def(nb::new_(&make_reader), "files"_a, "queue_depth"_a, "method"_a, "piece_bytes"_a)
        .def("register_buffers", &register_buffers, "buffers"_a, Unlocked(),
             "Pins memory, as (address, num_bytes), in place of what was pinned before. Returns 0 or an errno.")
        .def("submit", &submit, "reads"_a, Unlocked(),
             "Begins reads: (tag, index of the file, offset, num_bytes, address). Their memory must last.")
        .def("wait", &wait, "min_completed"_a, "timeout_s"_a, Unlocked(),
             "Returns (tag, status) of what has ended since the last call; the status is 0, an errno or\n"
             "END_OF_FILE. Waits until that many have ended, the time is up, or nothing more is under way.")
        .def("cancel", &DiskReader::cancel, "tags"_a, Unlocked(),
             "Drops the reads that have not begun and returns their tags.")
        .def("close", &DiskReader::close, Unlocked(), "Waits for what the kernel is reading.")
        .def_prop_ro("in_flight", &DiskReader::in_flight)
        .def_prop_ro("num_reads", &DiskReader::num_reads)
        .def_prop_ro("bytes_read", &DiskReader::bytes_read)
        .def_prop_ro("busy_s", &DiskReader::busy_s);
}

}  // namespace localmoe
