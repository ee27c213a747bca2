// The emulated device: its memory, its streams, and launching, as the driver's functions (driver.cpp) need them.
//
// Decision: a device that is strict. Memory is the processor's own, filled with 0xff bytes when it is given out; what
// is launched runs before the call returns. It complains, by the driver's error numbers and a sentence on standard
// error, about what a real driver leaves to chance: pointers that are not the device's, calls that a stream's capture
// forbids, blocks of more registers than there are.
//
// Environment, besides what runtime.hpp reads:
//   LNV_EMULATOR_CAPABILITY=9.0   compute capability
//   LNV_EMULATOR_MEMORY=8192      MiB of device memory
//   LNV_EMULATOR_GUARD=1          each allocation ends (to 16 bytes) where the next access faults
//   LNV_EMULATOR_LAZY=1           what a stream was given runs only when somebody waits for it
//   LNV_EMULATOR_RESOURCES=FILE   what tools/cuda/ptx.py --table wrote: launches are held to it
//   LNV_EMULATOR_TRACE=1          each launch is written to standard error
#pragma once

#include "registry.hpp"

#include <algorithm>
#include <chrono>
#include <memory>

namespace lnv_emulator {

using Result = int;
enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

struct Name {
    Result code;
    const char *name, *text;
};
const Name NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
};

// Says on standard error what the number alone does not.
Result refuse(Result code, const std::string &why) {
    fprintf(stderr, "cuda emulator: %s\n", why.c_str());
    return code;
}

bool is_set(const char *name) {
    const char *value = getenv(name);
    return value && *value && strcmp(value, "0") != 0;
}

// ---- state ----

using Work = std::function<void()>;

struct Graph {
    std::vector<Work> work;
};
struct Stream {
    bool capturing = false, broken = false;
    int mode = 0;
    Graph *graph = nullptr;
};
struct Event {
    bool recorded = false, done = false;
    std::chrono::steady_clock::time_point at;
};
struct Module {
    std::string ptx;
};
struct Range {
    size_t bytes; // as asked for
    void *map;
    size_t map_bytes;
};

struct Device {
    std::recursive_mutex lock;
    bool initialized = false;
    int major = 9, minor = 0;
    size_t total = 0, used = 0;
    bool guard = is_set("LNV_EMULATOR_GUARD"), lazy = is_set("LNV_EMULATOR_LAZY"), trace = is_set("LNV_EMULATOR_TRACE");
    std::map<uintptr_t, Range> memory, pinned; // by where they begin
    std::vector<Work> queue;                   // given to streams and not yet run
    Stream null_stream;
    std::vector<Stream *> captures;

    Device() {
        if (const char *capability = getenv("LNV_EMULATOR_CAPABILITY")) {
            if (sscanf(capability, "%d.%d", &major, &minor) != 2) fail("LNV_EMULATOR_CAPABILITY is not like 9.0");
        }
        const char *mebibytes = getenv("LNV_EMULATOR_MEMORY");
        total = (size_t)(mebibytes ? atol(mebibytes) : 8192) << 20;
    }
    size_t shared_per_block() const {
        int capability = major * 10 + minor;
        return capability >= 90 ? 232448 : capability == 80 || capability == 87 ? 166912 : 101376;
    }
    void run_queue() {
        while (!queue.empty()) {
            std::vector<Work> now;
            now.swap(queue);
            for (auto &work : now) work();
        }
    }
};
// Reads what each kernel needs on this GPU.
void read_resources(const Device &d) {
    const char *path = getenv("LNV_EMULATOR_RESOURCES");
    if (!path) return;
    FILE *file = fopen(path, "r");
    if (!file) fail("LNV_EMULATOR_RESOURCES cannot be read");
    char name[256], arch[32];
    int registers;
    size_t shared;
    while (fscanf(file, "%255s %31s %d %zu", name, arch, &registers, &shared) == 4) {
        auto found = kernels().find(name);
        if (found == kernels().end() || atoi(arch + 3) != d.major * 10 + d.minor) continue;
        found->second.registers = registers;
        found->second.fixed_shared = shared;
    }
    fclose(file);
}
Device &device() {
    static Device *one = new Device;
    return *one;
}
int primary_context; // its address is the context's handle
thread_local void *current_context = nullptr;

#define ENTER(context)                                                                                                \
    Device &d = device();                                                                                             \
    std::lock_guard<std::recursive_mutex> guard_of_device(d.lock);                                                    \
    if (!d.initialized) return NOT_INITIALIZED;                                                                       \
    if (context && !current_context) return INVALID_CONTEXT

bool within(const std::map<uintptr_t, Range> &ranges, uintptr_t at, size_t bytes) {
    auto next = ranges.upper_bound(at);
    if (next == ranges.begin()) return false;
    --next;
    return at + bytes <= next->first + next->second.bytes;
}
Stream *as_stream(void *handle) {
    uintptr_t number = (uintptr_t)handle; // 1 and 2: the legacy stream and the thread's
    return number <= 2 ? &device().null_stream : (Stream *)handle;
}

// Runs `work` in a stream's turn, or records it if the stream is captured.
Result enqueue(void *handle, Work work) {
    Device &d = device();
    Stream &stream = *as_stream(handle);
    if (stream.capturing) {
        if (stream.broken) return CAPTURE_INVALIDATED;
        stream.graph->work.push_back(std::move(work));
        return SUCCESS;
    }
    if (&stream == &d.null_stream && !d.captures.empty()) {
        return refuse(CAPTURE_UNSUPPORTED, "the null stream is used while another is captured");
    }
    if (d.lazy) {
        d.queue.push_back(std::move(work));
    } else {
        work();
    }
    return SUCCESS;
}
// What waits, or gives out or takes back memory, is forbidden while a stream is captured (but in relaxed mode).
Result forbidden_in_capture(const char *call) {
    for (Stream *stream : device().captures) {
        if (stream->mode == 2) continue;
        stream->broken = true;
        return refuse(CAPTURE_UNSUPPORTED, std::string(call) + " while a stream is captured");
    }
    return SUCCESS;
}
#define NOT_IN_CAPTURE(call)                                                                                          \
    if (Result refused = forbidden_in_capture(call)) return refused

// Checks a range of device memory (or pinned memory, which the device sees too).
Result check_range(const char *call, uint64_t at, size_t bytes) {
    if (bytes == 0 || within(device().memory, at, bytes) || within(device().pinned, at, bytes)) return SUCCESS;
    char text[200];
    snprintf(text, sizeof text, "%s: %zu bytes at 0x%llx are not within one allocation", call, bytes,
             (unsigned long long)at);
    return refuse(INVALID_VALUE, text);
}

// ---- memory ----

Result allocate(std::map<uintptr_t, Range> &ranges, size_t bytes, bool guard, uintptr_t *at) {
    if (bytes == 0) return INVALID_VALUE;
    size_t rounded = (bytes + (guard ? 15 : 511)) / (guard ? 16 : 512) * (guard ? 16 : 512);
    size_t pages = (rounded + PAGE - 1) / PAGE * PAGE;
    void *map = mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect((uint8_t *)map + pages, PAGE, PROT_NONE);
    // Guarded, the allocation's end is the page's; else its begin is, as aligned as the driver's are.
    *at = (uintptr_t)map + (guard ? pages - rounded : 0);
    memset(map, 0xff, pages);
    ranges[*at] = {bytes, map, pages + PAGE};
    return SUCCESS;
}
Result release(std::map<uintptr_t, Range> &ranges, uintptr_t at, size_t *bytes) {
    auto found = ranges.find(at);
    if (found == ranges.end()) return INVALID_VALUE;
    const Range &range = found->second;
    *bytes = range.bytes;
    // What lies between an allocation's end and the page's was nobody's to write.
    const uint8_t *end = (const uint8_t *)range.map + range.map_bytes - PAGE;
    for (const uint8_t *p = (const uint8_t *)at + range.bytes; p < end; p++) {
        if (*p == 0xff) continue;
        char text[200];
        snprintf(text, sizeof text, "somebody wrote %zu bytes behind an allocation of %zu bytes; LNV_EMULATOR_GUARD=1 says who",
                 (size_t)(p - (const uint8_t *)at) - range.bytes, range.bytes);
        fail(text);
    }
    munmap(found->second.map, found->second.map_bytes);
    ranges.erase(found);
    return SUCCESS;
}

// For an access that faulted, in a signal's handler: the lock may be held, and the maps are only read.
void describe(uintptr_t address, char *text, size_t bytes) {
    const auto &ranges = device().memory;
    auto next = ranges.upper_bound(address);
    if (next != ranges.begin()) {
        --next;
        size_t offset = address - next->first;
        if (offset < next->second.bytes + (1 << 20)) {
            snprintf(text, bytes, "an access to byte %zu of an allocation of %zu bytes", offset, next->second.bytes);
            return;
        }
        next++;
    }
    if (next != ranges.end() && next->first - address < (1 << 20)) {
        snprintf(text, bytes, "an access %zu bytes before an allocation of %zu bytes", next->first - address,
                 next->second.bytes);
        return;
    }
    snprintf(text, bytes, "an access to 0x%zx, which is in no allocation", (size_t)address);
}

// ---- launching ----

Result launch_kernel(void *function, Dim grid, Dim block, size_t shared, void *stream, void **parameters, void **extra) {
    Device &d = device();
    if (!function) return INVALID_HANDLE;
    Kernel &kernel = *(Kernel *)function;
    auto bad = [&](const std::string &why) { return refuse(INVALID_VALUE, kernel.name + ": " + why); };
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return bad("a grid without blocks");
    if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return bad("a grid that is too large");
    if (block.count() == 0 || block.count() > MAX_THREADS || block.z > 64) return bad("a block of no size that there is");
    bool fits = shared + kernel.fixed_shared <= 48 * 1024 || kernel.max_dynamic_shared > 48 * 1024;
    if (shared > kernel.max_dynamic_shared || !fits) return bad("more dynamic shared memory than cuFuncSetAttribute allowed");
    // A warp's registers are given out by 256.
    size_t registers = ((size_t)kernel.registers * LANES + 255) / 256 * 256 * ((block.count() + LANES - 1) / LANES);
    if (registers > 65536) {
        return refuse(LAUNCH_OUT_OF_RESOURCES, kernel.name + ": a block of more registers than there are");
    }

    std::vector<void *> places;
    if (!parameters && extra) { // {1, buffer, 2, &size, 0}: all parameters in a buffer
        uint8_t *buffer = nullptr;
        size_t size = 0, offset = 0;
        for (; *extra; extra += 2) {
            if (*extra == (void *)1) buffer = (uint8_t *)extra[1];
            if (*extra == (void *)2) size = *(size_t *)extra[1];
        }
        for (size_t bytes : kernel.sizes) {
            offset = (offset + bytes - 1) / bytes * bytes;
            places.push_back(buffer + offset);
            offset += bytes;
        }
        if (offset != size) return bad("parameters of another size than the kernel's");
        parameters = places.data();
    }
    for (size_t i = 0; i < kernel.sizes.size(); i++) {
        if (!parameters || !parameters[i]) return bad("too few parameters");
        if (!kernel.pointers[i]) continue;
        uintptr_t at;
        memcpy(&at, parameters[i], sizeof at);
        // One past the end is a pointer that may be given, and not be read.
        if (at != 0 && !within(d.memory, at, 0) && !within(d.pinned, at, 0)) {
            char text[200];
            snprintf(text, sizeof text, "parameter %zu, 0x%llx, is no pointer into device memory", i,
                     (unsigned long long)at);
            return refuse(ILLEGAL_ADDRESS, kernel.name + ": " + text);
        }
    }
    if (d.trace) {
        fprintf(stderr, "cuda emulator: launch %s <<<(%u,%u,%u), (%u,%u,%u), %zu>>>\n", kernel.name.c_str(), grid.x, grid.y,
                grid.z, block.x, block.y, block.z, shared);
    }
    const char *name = kernel.name.c_str();
    return enqueue(stream, [name, grid, block, shared, body = kernel.bind(parameters)] {
        run_grid({name, grid, block, shared, body});
    });
}

// Whether a module's PTX can run here, and has the entry.
Result check_target(const Device &d, const std::string &ptx) {
    size_t at = ptx.find(".target sm_");
    if (at == std::string::npos) return SUCCESS;
    int wanted = atoi(ptx.c_str() + at + 11), here = d.major * 10 + d.minor;
    size_t end = ptx.find_first_not_of("0123456789", at + 11);
    bool exact = end != std::string::npos && ptx[end] == 'a';
    if (exact ? wanted == here : wanted <= here) return SUCCESS;
    return refuse(NO_BINARY_FOR_GPU, "a module for another GPU: " + ptx.substr(at, 16));
}
bool has_entry(const std::string &ptx, const std::string &name) {
    if (ptx.find(".entry ") == std::string::npos) return true; // no PTX: nothing is known
    for (const char *after : {"(", " ", "\n"}) {
        if (ptx.find(".entry " + name + after) != std::string::npos) return true;
    }
    return false;
}

} // namespace lnv_emulator
