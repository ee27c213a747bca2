// The CUDA driver's functions, as libcuda.so.1 exports them, over the emulated device (device.hpp).
//
// Decision: the functions that this project calls, and their nearest kin, with the types and numbers of CUDA 12 written
// out here, so that no header of CUDA is needed. It knows no other contexts than the primary one, and one device. Of a
// module's image, only PTX is looked at: for which GPU it is, and which entries it has. The kernels are those built in.

#include "device.hpp"

using namespace lnv_emulator;

#define API extern "C" __attribute__((visibility("default"))) Result

// ---- the device ----

API cuInit(unsigned flags) {
    Device &d = device();
    std::lock_guard<std::recursive_mutex> guard(d.lock);
    if (flags != 0) return INVALID_VALUE;
    if (!d.initialized) read_resources(d);
    d.initialized = true;
    describe_address = describe;
    return SUCCESS;
}
API cuDriverGetVersion(int *version) {
    *version = 12040;
    return SUCCESS;
}
API cuDeviceGetCount(int *count) {
    ENTER(false);
    *count = 1;
    return SUCCESS;
}
API cuDeviceGet(int *handle, int ordinal) {
    ENTER(false);
    if (ordinal != 0) return INVALID_DEVICE;
    *handle = 0;
    return SUCCESS;
}
API cuDeviceGetName(char *name, int length, int) {
    ENTER(false);
    snprintf(name, (size_t)length, "Emulated device");
    return SUCCESS;
}
API cuDeviceGetUuid(void *uuid, int) {
    ENTER(false);
    memcpy(uuid, "emulated device!", 16);
    return SUCCESS;
}
API cuDeviceGetUuid_v2(void *uuid, int handle) { return cuDeviceGetUuid(uuid, handle); }
API cuDeviceTotalMem_v2(size_t *bytes, int) {
    ENTER(false);
    *bytes = d.total;
    return SUCCESS;
}
API cuDeviceGetAttribute(int *value, int attribute, int) {
    ENTER(false);
    switch (attribute) {
    case 1: *value = 1024; break;       // threads of a block
    case 2: *value = 1024; break;       // a block's x
    case 3: *value = 1024; break;       // y
    case 4: *value = 64; break;         // z
    case 5: *value = 2147483647; break; // a grid's x
    case 6: *value = 65535; break;      // y
    case 7: *value = 65535; break;      // z
    case 8: *value = 48 * 1024; break;  // shared memory of a block, without asking
    case 9: *value = 64 * 1024; break;  // constant memory
    case 10: *value = 32; break;        // warp
    case 11: *value = 2147483647; break; // pitch
    case 12: *value = 65536; break;     // registers of a block
    case 13: *value = 1000000; break;   // clock, kHz
    case 14: *value = 512; break;       // alignment of textures
    case 15: *value = 1; break;         // copies beside kernels
    case 16: *value = 4; break;         // multiprocessors
    case 19: *value = 1; break;         // can map host memory
    case 31: *value = 1; break;         // kernels beside kernels
    case 36: *value = 1000000; break;   // memory's clock, kHz
    case 37: *value = 1024; break;      // width of its bus
    case 38: *value = 32 << 20; break;  // second-level cache
    case 39: *value = 2048; break;      // threads of a multiprocessor
    case 40: *value = 1; break;         // engines that copy
    case 41: *value = 1; break;         // one address space
    case 75: *value = d.major; break;   // compute capability
    case 76: *value = d.minor; break;
    case 81: *value = (int)d.shared_per_block() + 1024; break; // shared memory of a multiprocessor
    case 82: *value = 65536; break;                            // its registers
    case 95: *value = 1; break;                                // cooperative launches
    case 97: *value = (int)d.shared_per_block(); break;        // shared memory of a block that asks
    case 106: *value = 32; break;                              // blocks of a multiprocessor
    case 111: *value = 1024; break;                            // shared memory that a block costs by itself
    default: *value = 0;
    }
    return SUCCESS;
}

// ---- contexts ----

API cuDevicePrimaryCtxRetain(void **context, int) {
    ENTER(false);
    *context = &primary_context;
    return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) {
    ENTER(false);
    return SUCCESS;
}
API cuCtxSetCurrent(void *context) {
    ENTER(false);
    if (context && context != &primary_context) return INVALID_CONTEXT;
    current_context = context;
    return SUCCESS;
}
API cuCtxGetCurrent(void **context) {
    ENTER(false);
    *context = current_context;
    return SUCCESS;
}
API cuCtxGetDevice(int *handle) {
    ENTER(true);
    *handle = 0;
    return SUCCESS;
}
API cuCtxSynchronize() {
    ENTER(true);
    NOT_IN_CAPTURE("cuCtxSynchronize");
    d.run_queue();
    return SUCCESS;
}

// ---- memory ----

API cuMemGetInfo_v2(size_t *free, size_t *total) {
    ENTER(true);
    *free = d.total - d.used;
    *total = d.total;
    return SUCCESS;
}
API cuMemAlloc_v2(uint64_t *at, size_t bytes) {
    ENTER(true);
    NOT_IN_CAPTURE("cuMemAlloc");
    if (bytes > d.total - d.used) return OUT_OF_MEMORY;
    uintptr_t address = 0;
    if (Result refused = allocate(d.memory, bytes, d.guard, &address)) return refused;
    d.used += bytes;
    *at = address;
    return SUCCESS;
}
API cuMemFree_v2(uint64_t at) {
    ENTER(true);
    NOT_IN_CAPTURE("cuMemFree");
    if (at == 0) return SUCCESS;
    d.run_queue(); // freeing waits for all that was begun
    size_t bytes = 0;
    if (Result refused = release(d.memory, at, &bytes)) return refuse(refused, "cuMemFree of what was not given out");
    d.used -= bytes;
    return SUCCESS;
}
API cuMemHostAlloc(void **at, size_t bytes, unsigned) {
    ENTER(true);
    NOT_IN_CAPTURE("cuMemHostAlloc");
    uintptr_t address = 0;
    if (Result refused = allocate(d.pinned, bytes, false, &address)) return refused;
    *at = (void *)address;
    return SUCCESS;
}
API cuMemAllocHost_v2(void **at, size_t bytes) { return cuMemHostAlloc(at, bytes, 0); }
API cuMemFreeHost(void *at) {
    ENTER(true);
    NOT_IN_CAPTURE("cuMemFreeHost");
    d.run_queue();
    size_t bytes = 0;
    return release(d.pinned, (uintptr_t)at, &bytes);
}

// From or to memory that is not pinned, nothing is asynchronous, nor can be captured.
static Result copy(const char *call, void *to, const void *from, size_t bytes, const void *host, void *stream, bool waits) {
    Device &d = device();
    bool pageable = host && !within(d.pinned, (uintptr_t)host, bytes);
    if (waits) {
        NOT_IN_CAPTURE(call);
    } else if (pageable && as_stream(stream)->capturing) {
        as_stream(stream)->broken = true;
        return refuse(CAPTURE_UNSUPPORTED, std::string(call) + " with memory that is not pinned, in a capture");
    }
    if (bytes == 0) return SUCCESS;
    if (Result refused = enqueue(stream, [=] { memmove(to, from, bytes); })) return refused;
    if (waits || pageable) d.run_queue();
    return SUCCESS;
}
API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    ENTER(true);
    if (Result refused = check_range("cuMemcpyHtoDAsync", to, bytes)) return refused;
    return copy("cuMemcpyHtoDAsync", (void *)to, from, bytes, from, stream, false);
}
API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    ENTER(true);
    if (Result refused = check_range("cuMemcpyDtoHAsync", from, bytes)) return refused;
    return copy("cuMemcpyDtoHAsync", to, (const void *)from, bytes, to, stream, false);
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    ENTER(true);
    if (Result refused = check_range("cuMemcpyDtoDAsync, to", to, bytes)) return refused;
    if (Result refused = check_range("cuMemcpyDtoDAsync, from", from, bytes)) return refused;
    return copy("cuMemcpyDtoDAsync", (void *)to, (const void *)from, bytes, nullptr, stream, false);
}
API cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    ENTER(true);
    if (Result refused = check_range("cuMemcpyHtoD", to, bytes)) return refused;
    return copy("cuMemcpyHtoD", (void *)to, from, bytes, from, nullptr, true);
}
API cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    ENTER(true);
    if (Result refused = check_range("cuMemcpyDtoH", from, bytes)) return refused;
    return copy("cuMemcpyDtoH", to, (const void *)from, bytes, to, nullptr, true);
}
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemsetD8Async(uint64_t at, unsigned char value, size_t count, void *stream) {
    ENTER(true);
    if (Result refused = check_range("cuMemsetD8Async", at, count)) return refused;
    return enqueue(stream, [=] { memset((void *)at, value, count); });
}
API cuMemsetD32Async(uint64_t at, unsigned value, size_t count, void *stream) {
    ENTER(true);
    if (at % 4 != 0) return INVALID_VALUE;
    if (Result refused = check_range("cuMemsetD32Async", at, count * 4)) return refused;
    return enqueue(stream, [=] { std::fill_n((uint32_t *)at, count, value); });
}
API cuMemsetD8_v2(uint64_t at, unsigned char value, size_t count) { return cuMemsetD8Async(at, value, count, nullptr); }
API cuMemsetD32_v2(uint64_t at, unsigned value, size_t count) { return cuMemsetD32Async(at, value, count, nullptr); }

// ---- streams and events ----

API cuStreamCreate(void **stream, unsigned) {
    ENTER(true);
    *stream = new Stream;
    return SUCCESS;
}
API cuStreamDestroy_v2(void *stream) {
    ENTER(true);
    d.run_queue();
    if (as_stream(stream) == &d.null_stream) return INVALID_HANDLE;
    delete (Stream *)stream;
    return SUCCESS;
}
API cuStreamSynchronize(void *stream) {
    ENTER(true);
    if (as_stream(stream)->capturing) as_stream(stream)->broken = true;
    NOT_IN_CAPTURE("cuStreamSynchronize");
    if (as_stream(stream)->capturing) return CAPTURE_UNSUPPORTED;
    d.run_queue();
    return SUCCESS;
}
API cuStreamQuery(void *) {
    ENTER(true);
    NOT_IN_CAPTURE("cuStreamQuery");
    d.run_queue(); // so that who polls comes to an end
    return SUCCESS;
}
API cuStreamWaitEvent(void *, void *event, unsigned) {
    ENTER(true);
    return event ? SUCCESS : INVALID_HANDLE; // all streams run in the order in which they were given work
}
API cuEventCreate(void **event, unsigned) {
    ENTER(true);
    *event = new Event;
    return SUCCESS;
}
API cuEventDestroy_v2(void *event) {
    ENTER(true);
    d.run_queue();
    delete (Event *)event;
    return SUCCESS;
}
API cuEventRecord(void *handle, void *stream) {
    ENTER(true);
    if (!handle) return INVALID_HANDLE;
    Event *event = (Event *)handle;
    if (!as_stream(stream)->capturing) {
        event->recorded = true;
        event->done = false;
    }
    return enqueue(stream, [event] {
        event->at = std::chrono::steady_clock::now();
        event->recorded = event->done = true;
    });
}
API cuEventSynchronize(void *event) {
    ENTER(true);
    if (!event) return INVALID_HANDLE;
    NOT_IN_CAPTURE("cuEventSynchronize");
    d.run_queue();
    return SUCCESS;
}
// An event that was recorded is not ready when first asked, if work is done lazily, and is the next time.
API cuEventQuery(void *handle) {
    ENTER(true);
    if (!handle) return INVALID_HANDLE;
    NOT_IN_CAPTURE("cuEventQuery");
    Event &event = *(Event *)handle;
    bool ready = !event.recorded || event.done;
    d.run_queue();
    return ready ? SUCCESS : NOT_READY;
}
API cuEventElapsedTime(float *milliseconds, void *from, void *to) {
    ENTER(true);
    if (!from || !to) return INVALID_HANDLE;
    Event &begin = *(Event *)from, &end = *(Event *)to;
    if (!begin.recorded || !end.recorded) return INVALID_HANDLE;
    if (!begin.done || !end.done) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end.at - begin.at).count();
    return SUCCESS;
}
API cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) { return cuEventElapsedTime(milliseconds, from, to); }

// ---- modules and functions ----

API cuModuleLoadData(void **module, const void *image) {
    ENTER(true);
    if (!image) return INVALID_VALUE;
    NOT_IN_CAPTURE("cuModuleLoadData");
    std::string ptx;
    const uint8_t *bytes = (const uint8_t *)image;
    bool binary = !memcmp(bytes, "\x7f" "ELF", 4) || (bytes[0] == 0x50 && bytes[1] == 0xed && bytes[2] == 0x55 && bytes[3] == 0xba);
    if (!binary) ptx = (const char *)image;
    if (Result refused = check_target(d, ptx)) return refused;
    *module = new Module{ptx};
    return SUCCESS;
}
API cuModuleLoadDataEx(void **module, const void *image, unsigned, int *, void **) { return cuModuleLoadData(module, image); }
API cuModuleUnload(void *module) {
    ENTER(true);
    delete (Module *)module;
    return SUCCESS;
}
API cuModuleGetFunction(void **function, void *module, const char *name) {
    ENTER(true);
    if (!module || !function || !name) return INVALID_VALUE;
    auto found = kernels().find(name);
    bool in_ptx = has_entry(((Module *)module)->ptx, name);
    if (found == kernels().end()) return NOT_FOUND;
    if (!in_ptx) return refuse(NOT_FOUND, std::string(name) + " is not in the module's PTX; tools/cuda/ptx.py makes it anew");
    *function = &found->second;
    return SUCCESS;
}
API cuFuncSetAttribute(void *function, int attribute, int value) {
    ENTER(true);
    if (!function) return INVALID_HANDLE;
    if (attribute == 8) { // dynamic shared memory
        size_t fixed = ((Kernel *)function)->fixed_shared;
        if (value < 0 || (size_t)value + fixed > d.shared_per_block()) return INVALID_VALUE;
        ((Kernel *)function)->max_dynamic_shared = (size_t)value;
        return SUCCESS;
    }
    return attribute == 9 ? SUCCESS : INVALID_VALUE; // 9: how much of the cache is shared memory
}
API cuFuncGetAttribute(int *value, int attribute, void *function) {
    ENTER(true);
    if (!function) return INVALID_HANDLE;
    switch (attribute) {
    case 0: *value = 1024; break; // threads of a block
    case 1: *value = (int)((Kernel *)function)->fixed_shared; break;
    case 4: *value = ((Kernel *)function)->registers ? ((Kernel *)function)->registers : 64; break;
    case 5:
    case 6: *value = d.major * 10 + d.minor; break; // versions of PTX and of the binary
    case 8: *value = (int)((Kernel *)function)->max_dynamic_shared; break;
    default: *value = 0;
    }
    return SUCCESS;
}
API cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
    ENTER(false);
    const Kernel &kernel = *(const Kernel *)function;
    if (index >= kernel.sizes.size()) return INVALID_VALUE;
    *offset = 0;
    for (size_t i = 0; i <= index; i++) {
        *offset = (*offset + kernel.sizes[i] - 1) / kernel.sizes[i] * kernel.sizes[i];
        if (i < index) *offset += kernel.sizes[i];
    }
    if (size) *size = kernel.sizes[index];
    return SUCCESS;
}
API cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    ENTER(true);
    return launch_kernel(function, Dim(grid_x, grid_y, grid_z), Dim(x, y, z), shared, stream, parameters, extra);
}
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned attribute_count;
};
API cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    ENTER(true);
    if (!config) return INVALID_VALUE;
    const unsigned *grid = config->grid, *block = config->block;
    return launch_kernel(function, Dim(grid[0], grid[1], grid[2]), Dim(block[0], block[1], block[2]), config->shared,
                         config->stream, parameters, extra);
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    ENTER(true);
    if (!function || threads <= 0) return INVALID_VALUE;
    size_t by_memory = shared ? (d.shared_per_block() + 1024) / (shared + 1024) : 32;
    *blocks = (int)std::min<size_t>(by_memory, (size_t)(2048 / threads));
    return SUCCESS;
}

// ---- capturing ----

API cuStreamBeginCapture_v2(void *stream, int mode) {
    ENTER(true);
    Stream &s = *as_stream(stream);
    if (&s == &d.null_stream) return refuse(CAPTURE_UNSUPPORTED, "the null stream cannot be captured");
    if (s.capturing || mode < 0 || mode > 2) return INVALID_VALUE;
    s.capturing = true;
    s.broken = false;
    s.mode = mode;
    s.graph = new Graph;
    d.captures.push_back(&s);
    return SUCCESS;
}
API cuStreamEndCapture(void *stream, void **graph) {
    ENTER(true);
    Stream &s = *as_stream(stream);
    if (!s.capturing) return INVALID_VALUE;
    s.capturing = false;
    d.captures.erase(std::find(d.captures.begin(), d.captures.end(), &s));
    if (s.broken) {
        delete s.graph;
        *graph = nullptr;
        return CAPTURE_INVALIDATED;
    }
    *graph = s.graph;
    return SUCCESS;
}
API cuStreamIsCapturing(void *stream, int *status) {
    ENTER(true);
    const Stream &s = *as_stream(stream);
    *status = !s.capturing ? 0 : s.broken ? 2 : 1;
    return SUCCESS;
}
API cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    ENTER(true);
    if (!graph) return INVALID_VALUE;
    *executable = new std::shared_ptr<Graph>(new Graph(*(Graph *)graph));
    return SUCCESS;
}
API cuGraphUpload(void *, void *) { return SUCCESS; }
API cuGraphLaunch(void *executable, void *stream) {
    ENTER(true);
    if (!executable) return INVALID_VALUE;
    auto graph = *(std::shared_ptr<Graph> *)executable;
    if (d.trace) fprintf(stderr, "cuda emulator: a graph of %zu\n", graph->work.size());
    return enqueue(stream, [graph] {
        for (auto &work : graph->work) work();
    });
}
API cuGraphExecDestroy(void *executable) {
    ENTER(true);
    delete (std::shared_ptr<Graph> *)executable;
    return SUCCESS;
}
API cuGraphDestroy(void *graph) {
    ENTER(true);
    delete (Graph *)graph;
    return SUCCESS;
}
API cuGraphGetNodes(void *graph, void **, size_t *count) {
    ENTER(true);
    *count = ((Graph *)graph)->work.size();
    return SUCCESS;
}

// ---- errors ----

API cuGetErrorName(Result code, const char **text) {
    for (const Name &name : NAMES) {
        if (name.code == code) return *text = name.name, SUCCESS;
    }
    *text = nullptr;
    return INVALID_VALUE;
}
API cuGetErrorString(Result code, const char **text) {
    for (const Name &name : NAMES) {
        if (name.code == code) return *text = name.text, SUCCESS;
    }
    *text = nullptr;
    return INVALID_VALUE;
}
