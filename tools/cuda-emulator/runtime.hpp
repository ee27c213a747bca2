// Runs a CUDA kernel, compiled for the processor, one block after the other: the emulator's core.
//
// Decision: each thread of a block is a fiber with a stack of its own, and all fibers of a block run on one
// thread of the operating system. A fiber runs until it waits: at a barrier, or at an operation of its warp,
// where the last lane that arrives computes for all. That is slow, but exact, needs nothing of the kernels, and
// is adversarial where a GPU is merciful: warps run as far apart as barriers let them, in an order that can be
// changed; shared memory is filled with 0xff bytes (NaN) before each block; dynamic shared memory ends where the
// next access faults; and what waits for ever is named. It refuses kernels whose blocks wait for each other.
//
// Environment (or `lnv_emulator::options()`):
//   LNV_EMULATOR_ORDER=forward|reverse|shuffle   order of blocks, warps and lanes; LNV_EMULATOR_SEED for shuffle
//   LNV_EMULATOR_COPY=late|early                 when cp.async writes: at the wait (late) or at once
//   LNV_EMULATOR_THREADS=N                       blocks that run at a time; 2 unless told
#pragma once

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <link.h>
#endif
#if !defined(__x86_64__) || defined(LNV_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace lnv_emulator {

enum class Order { Forward, Reverse, Shuffle };

struct Options {
    Order order = Order::Forward;
    bool copy_early = false;
    unsigned threads = 2;
    uint32_t seed = 1;
    Options() {
        const char *order_name = getenv("LNV_EMULATOR_ORDER");
        if (order_name && !strcmp(order_name, "reverse")) order = Order::Reverse;
        if (order_name && !strcmp(order_name, "shuffle")) order = Order::Shuffle;
        const char *copy = getenv("LNV_EMULATOR_COPY");
        copy_early = copy && !strcmp(copy, "early");
        if (const char *count = getenv("LNV_EMULATOR_THREADS")) threads = (unsigned)atoi(count);
        if (const char *number = getenv("LNV_EMULATOR_SEED")) seed = (uint32_t)atoi(number);
        if (threads == 0) threads = 1;
    }
};
inline Options &options() {
    static Options all;
    return all;
}

// dim3, threadIdx and their kin.
struct Dim {
    unsigned x, y, z;
    constexpr Dim() : x(1), y(1), z(1) {}
    template <class X, class Y = unsigned, class Z = unsigned, class = std::enable_if_t<std::is_integral_v<X>>>
    constexpr Dim(X x, Y y = 1, Z z = 1) : x((unsigned)x), y((unsigned)y), z((unsigned)z) {}
    constexpr size_t count() const { return (size_t)x * y * z; }
};

constexpr unsigned LANES = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t PAGE = 4096;
constexpr size_t MAX_SHARED = 232448; // what a block of compute capability 9.0 may have

// ---- fibers: a context, and switching to another ----

#if defined(__x86_64__) && !defined(LNV_EMULATOR_UCONTEXT)
struct Context {
    void *stack = nullptr;
};
// Keeps the callee's registers on the stack that is left, and takes those of the other from its stack.
__attribute__((naked, noinline)) inline void switch_stacks(void **, void *) {
    asm volatile("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
                 "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
                 "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
inline void switch_to(Context &from, Context &to) { switch_stacks(&from.stack, to.stack); }
inline void begin_context(Context &context, uint8_t *stack, size_t bytes, void (*entry)()) {
    void **top = (void **)(((uintptr_t)stack + bytes) & ~(uintptr_t)15);
    *--top = nullptr; // where the entry would return to
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.stack = top;
}
#else
struct Context {
    ucontext_t state;
};
inline void switch_to(Context &from, Context &to) { swapcontext(&from.state, &to.state); }
inline void begin_context(Context &context, uint8_t *stack, size_t bytes, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}
#endif

// ---- a block and its threads ----

// One launch: what all blocks share. `body` calls the kernel with its arguments.
struct Launch {
    const char *name;
    Dim grid, block;
    size_t shared;
    std::function<void()> body;
};

struct Warp;
struct Worker;

struct Copy {
    void *to;
    const void *from;
    bool valid;
    unsigned group;
};

struct Fiber {
    Context context;
    Dim thread;
    unsigned lane = 0;
    Warp *warp = nullptr;
    Worker *worker = nullptr;
    const char *waits = nullptr; // for what, if it does
    bool ended = false;
    std::vector<Copy> copies; // cp.async: begun and not yet effective
    unsigned groups = 0;      // cp.async: groups ended
};

// Computes for all lanes of `members`; operands[l] is what lane l brought.
using Collective = void (*)(uint32_t members, void *const *operands);

// Lanes that wait for each other: those of one warp at one operation with one mask.
struct Group {
    Collective operation;
    const char *name;
    bool whole; // the operation is for whole warps only
    uint32_t mask, arrived;
};

struct Warp {
    uint32_t alive = 0, ready = 0;
    void *operands[LANES];
    Group groups[LANES];
    unsigned group_count = 0;
    Fiber *fibers = nullptr;
};

// What runs blocks: one for each thread of the operating system that does.
struct Worker {
    Context scheduler;
    std::vector<Fiber> fibers{MAX_THREADS};
    std::vector<Warp> warps{MAX_THREADS / LANES};
    uint8_t *stacks = nullptr;
    unsigned stack_count = 0;
    uint8_t *arena = nullptr; // dynamic shared memory ends at arena + MAX_SHARED, and a page without access follows
    uint8_t *shared = nullptr;
    uint8_t *fixed = nullptr; // `__shared__` arrays
    size_t fixed_bytes = 0;
    const Launch *launch = nullptr;
    Dim index;
    unsigned warp_count = 0, alive = 0;
    unsigned at_barrier = 0;
    int barrier_sum[3] = {0, 0, 0}, barrier_result[3] = {0, 0, 0}; // predicates: how many, how many true; arrived
    uint32_t random = 1;
    Order order = Order::Forward;
    uint32_t turn = 0; // lanes of the warp that runs which go before another warp does

    Worker();
    void run_block(const Launch &launch, Dim index);
    void leave(Fiber &fiber);
    unsigned pick_lane();
    void deadlock();
    uint32_t next_random(uint32_t below) {
        random = random * 1664525u + 1013904223u;
        return (uint32_t)(((uint64_t)random * below) >> 32);
    }
};

#if defined(__x86_64__) && !defined(LNV_EMULATOR_UCONTEXT)
#define LNV_EMULATOR_FAST_TLS
#else
#define LNV_EMULATOR_FAST_TLS
#endif
// The thread of the kernel that runs now; null outside of kernels.
inline thread_local Fiber *self LNV_EMULATOR_FAST_TLS = nullptr;

inline void place(FILE *to, const Fiber &fiber) {
    const Worker &w = *fiber.worker;
    fprintf(to, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u)", w.launch->name, w.index.x, w.index.y, w.index.z,
            fiber.thread.x, fiber.thread.y, fiber.thread.z);
}
// Ends the program with a sentence: the kernel did what it must not.
[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "cuda emulator: ");
    if (self) place(stderr, *self);
    fprintf(stderr, ": %s\n", what);
    fflush(stderr);
    abort();
}

// ---- waiting ----

// The lane whose turn it is.
inline unsigned Worker::pick_lane() {
    unsigned lane = (unsigned)__builtin_ctz(turn);
    if (order == Order::Reverse) lane = 31u - (unsigned)__builtin_clz(turn);
    if (order == Order::Shuffle) {
        uint32_t rest = turn;
        for (uint32_t skip = next_random((uint32_t)__builtin_popcount(turn)); skip > 0; skip--) rest &= rest - 1;
        lane = (unsigned)__builtin_ctz(rest);
    }
    turn &= ~(1u << lane);
    return lane;
}

// Goes on with another lane of the warp or, if none is ready, with the scheduler. In order, a warp goes as far as it
// can by itself; shuffled, each lane goes once. To go from lane to lane directly is three times as fast.
inline void Worker::leave(Fiber &fiber) {
    Warp &warp = *fiber.warp;
    if (turn == 0 && order != Order::Shuffle) turn = warp.ready;
    if (turn == 0) {
        self = nullptr;
        switch_to(fiber.context, scheduler);
    } else {
        self = &warp.fibers[pick_lane()];
        switch_to(fiber.context, self->context);
    }
}

inline void yield(const char *waits) {
    Fiber &me = *self;
    me.waits = waits;
    me.worker->leave(me);
    me.waits = nullptr;
}

inline bool complete(const Warp &warp, const Group &group) { return (group.mask & warp.alive & ~group.arrived) == 0; }

// Computes a group's operation; its lanes may go on.
inline void finish(Warp &warp, unsigned index) {
    Group group = warp.groups[index];
    warp.groups[index] = warp.groups[--warp.group_count];
    if (group.whole && group.arrived != 0xffffffffu) {
        fprintf(stderr, "cuda emulator: %s\n", group.name);
        fail("an operation of the whole warp, and not all of its lanes are there");
    }
    group.operation(group.arrived, warp.operands);
    warp.ready |= group.arrived;
}

// Brings `operand`, waits until all lanes of `mask` have brought theirs, and lets the last of them compute.
inline void collective(const char *name, uint32_t mask, void *operand, Collective operation, bool whole = false) {
    Fiber &me = *self;
    Warp &warp = *me.warp;
    uint32_t bit = 1u << me.lane;
    if (!(mask & bit)) fail("an operation of the warp whose mask lacks the lane itself");
    warp.operands[me.lane] = operand;
    unsigned i = 0;
    while (i < warp.group_count && (warp.groups[i].operation != operation || warp.groups[i].mask != mask)) i++;
    if (i == warp.group_count) warp.groups[warp.group_count++] = {operation, name, whole, mask, 0};
    warp.groups[i].arrived |= bit;
    if (complete(warp, warp.groups[i])) {
        finish(warp, i);
    } else {
        warp.ready &= ~bit;
        yield(name);
    }
}

inline void release_barrier(Worker &w) {
    for (int i = 0; i < 3; i++) w.barrier_result[i] = w.barrier_sum[i], w.barrier_sum[i] = 0;
    w.at_barrier = 0;
    for (unsigned i = 0; i < w.warp_count; i++) w.warps[i].ready = w.warps[i].alive;
}
inline void barrier(bool predicate = false) {
    Fiber &me = *self;
    Worker &w = *me.worker;
    w.barrier_sum[0] += predicate;
    w.barrier_sum[1] += 1;
    if (++w.at_barrier == w.alive) {
        release_barrier(w);
    } else {
        me.warp->ready &= ~(1u << me.lane);
        yield("__syncthreads");
    }
}

// ---- cp.async ----

inline bool is_shared(const void *pointer, size_t bytes) {
    const Worker &w = *self->worker;
    const uint8_t *p = (const uint8_t *)pointer;
    return (p >= w.shared && p + bytes <= w.arena + MAX_SHARED) || (p >= w.fixed && p + bytes <= w.fixed + w.fixed_bytes);
}
inline void apply(const Copy &copy) {
    if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
    } else {
        memset(copy.to, 0, 16);
    }
}
inline void begin_copy(void *to, const void *from, bool valid) {
    if (!is_shared(to, 16)) fail("copy_async writes to what is not shared memory");
    if ((uintptr_t)to % 16 != 0) fail("copy_async writes to an address that is no multiple of 16");
    if ((uintptr_t)from % 16 != 0 && valid) fail("copy_async reads from an address that is no multiple of 16");
    Copy copy = {to, from, valid, self->groups};
    if (options().copy_early) {
        apply(copy);
    } else {
        self->copies.push_back(copy);
    }
}
inline void end_copy_group() { self->groups++; }
inline void wait_for_copies(unsigned under_way) {
    Fiber &me = *self;
    size_t done = 0;
    while (done < me.copies.size() && me.copies[done].group + under_way < me.groups) apply(me.copies[done++]);
    me.copies.erase(me.copies.begin(), me.copies.begin() + (long)done);
}

} // namespace lnv_emulator

#include "faults.hpp"

namespace lnv_emulator {

// ---- running a block ----

inline void fiber_entry() {
    Fiber &me = *self;
    Worker &w = *me.worker;
    w.launch->body();
    Warp &warp = *me.warp;
    uint32_t bit = 1u << me.lane;
    me.ended = true;
    warp.alive &= ~bit;
    warp.ready &= ~bit;
    w.alive--;
    // The others no longer wait for this one.
    for (unsigned i = 0; i < warp.group_count;) {
        if (complete(warp, warp.groups[i])) {
            finish(warp, i);
        } else {
            i++;
        }
    }
    if (w.alive > 0 && w.at_barrier == w.alive) release_barrier(w);
    w.leave(me);
    abort(); // an ended fiber is not gone on with
}

#ifdef __linux__
// `__shared__` arrays are variables of this section, one copy for each thread of the operating system.
extern "C" char __start_lnv_shared[] __attribute__((visibility("hidden"), weak));
extern "C" char __stop_lnv_shared[] __attribute__((visibility("hidden"), weak));
static thread_local char shared_marker[16] __attribute__((section("lnv_shared"), used));

// Finds this thread's copy of the section.
static inline int find_fixed_shared(dl_phdr_info *info, size_t, void *data) {
    bool mine = false;
    uintptr_t code = (uintptr_t)&find_fixed_shared, image = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &header = info->dlpi_phdr[i];
        uintptr_t begin = info->dlpi_addr + header.p_vaddr;
        if (header.p_type == PT_LOAD && code >= begin && code < begin + header.p_memsz) mine = true;
        if (header.p_type == PT_TLS) image = begin;
    }
    if (!mine || !image || !info->dlpi_tls_data) return 0;
    Worker &w = *(Worker *)data;
    w.fixed = (uint8_t *)info->dlpi_tls_data + ((uintptr_t)__start_lnv_shared - image);
    w.fixed_bytes = (size_t)(__stop_lnv_shared - __start_lnv_shared);
    return 1;
}
#endif

inline Worker::Worker() {
    auto reserve = [](size_t bytes) {
        void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fail("no memory for the threads of a block");
        return (uint8_t *)p;
    };
    stacks = reserve(MAX_THREADS * (STACK_BYTES + PAGE));
    constexpr size_t pad = (PAGE - MAX_SHARED % PAGE) % PAGE; // so that the arena ends where a page does
    arena = reserve(pad + MAX_SHARED + PAGE) + pad;
    mprotect(arena + MAX_SHARED, PAGE, PROT_NONE);
    watch_faults();
#ifdef __linux__
    ((volatile char *)shared_marker)[0] = 0; // makes this thread's copy
    dl_iterate_phdr(find_fixed_shared, this);
#endif
}

inline void Worker::deadlock() {
    fprintf(stderr, "cuda emulator: deadlock: %u threads wait, and none can go on:\n", alive);
    unsigned shown = 0;
    const char *last = nullptr;
    for (unsigned i = 0; i < warp_count * LANES; i++) {
        Fiber &fiber = fibers[i];
        if (!(warps[i / LANES].alive >> (i % LANES) & 1)) continue;
        if (fiber.waits == last && i % LANES != 0) continue; // like the one before
        last = fiber.waits;
        fprintf(stderr, "  ");
        place(stderr, fiber);
        fprintf(stderr, " (and those after it) waits for %s\n", fiber.waits ? fiber.waits : "nothing");
        if (++shown == 40) break;
    }
    fflush(stderr);
    abort();
}

inline void Worker::run_block(const Launch &l, Dim block_index) {
    launch = &l;
    index = block_index;
    unsigned threads = (unsigned)l.block.count();
    warp_count = (threads + LANES - 1) / LANES;
    alive = threads;
    at_barrier = 0;
    for (int i = 0; i < 3; i++) barrier_sum[i] = 0;
    shared = arena + MAX_SHARED - (l.shared + 127) / 128 * 128;
    memset(shared, 0xff, (size_t)(arena + MAX_SHARED - shared));
    if (fixed) memset(fixed, 0xff, fixed_bytes);

    for (; stack_count < threads; stack_count++) { // the page below a stack faults
        mprotect(stacks + stack_count * (STACK_BYTES + PAGE), PAGE, PROT_NONE);
    }
    for (unsigned i = 0; i < warp_count; i++) {
        unsigned lanes = threads - i * LANES < LANES ? threads - i * LANES : LANES;
        warps[i].alive = warps[i].ready = lanes == LANES ? 0xffffffffu : (1u << lanes) - 1;
        warps[i].group_count = 0;
        warps[i].fibers = &fibers[i * LANES];
    }
    for (unsigned i = 0; i < threads; i++) {
        Fiber &f = fibers[i];
        f.thread = Dim(i % l.block.x, i / l.block.x % l.block.y, i / l.block.x / l.block.y);
        f.lane = i % LANES;
        f.warp = &warps[i / LANES];
        f.worker = this;
        f.waits = nullptr;
        f.ended = false;
        f.copies.clear();
        f.groups = 0;
        // Tops of stacks are moved against each other, lest all fall into the same lines of the cache.
        begin_context(f.context, stacks + i * (STACK_BYTES + PAGE) + PAGE, STACK_BYTES - i % 32 * 128, fiber_entry);
    }

    order = options().order;
    unsigned warp_order[MAX_THREADS / LANES];
    for (unsigned i = 0; i < warp_count; i++) warp_order[i] = order == Order::Reverse ? warp_count - 1 - i : i;
    random = options().seed + (index.x * 7919u + index.y * 104729u + index.z * 1299709u);
    while (alive > 0) {
        bool progress = false;
        if (order == Order::Shuffle) {
            for (unsigned i = warp_count; i > 1; i--) std::swap(warp_order[i - 1], warp_order[next_random(i)]);
        }
        for (unsigned i = 0; i < warp_count; i++) {
            Warp &warp = warps[warp_order[i]];
            turn = warp.ready;
            if (turn == 0) continue;
            progress = true;
            self = &warp.fibers[pick_lane()];
            switch_to(scheduler, self->context);
        }
        if (!progress) deadlock();
    }
}

// ---- running a grid ----

inline Worker &this_worker() {
    static thread_local Worker *worker = nullptr;
    if (!worker) worker = new Worker; // lives as long as the program
    return *worker;
}

// Runs blocks of one grid at a time on a few threads.
struct Pool {
    std::mutex one_grid, lock;
    std::condition_variable begin, end;
    const Launch *launch = nullptr;
    size_t count = 0, next = 0, left = 0;
    uint64_t stride = 1, offset = 0;
    unsigned helpers = 0;

    static Pool &get() {
        static Pool *pool = new Pool; // never destroyed: its threads may outlive main
        return *pool;
    }
    // The block that is the i-th to run.
    size_t block_at(size_t i) const {
        if (options().order == Order::Reverse) return count - 1 - i;
        if (options().order == Order::Shuffle) return (size_t)((i * stride + offset) % count);
        return i;
    }
    bool run_one(std::unique_lock<std::mutex> &guard) {
        if (!launch || next == count) return false;
        const Launch &l = *launch;
        size_t i = block_at(next++);
        guard.unlock();
        size_t x = i % l.grid.x, y = i / l.grid.x % l.grid.y, z = i / l.grid.x / l.grid.y;
        this_worker().run_block(l, Dim((unsigned)x, (unsigned)y, (unsigned)z));
        guard.lock();
        if (--left == 0) end.notify_all();
        return true;
    }
    void help() {
        std::unique_lock<std::mutex> guard(lock);
        while (true) {
            if (!run_one(guard)) begin.wait(guard);
        }
    }
    static uint64_t gcd(uint64_t a, uint64_t b) { return b ? gcd(b, a % b) : a; }
    void run(const Launch &l) {
        std::lock_guard<std::mutex> only(one_grid);
        std::unique_lock<std::mutex> guard(lock);
        for (; helpers + 1 < options().threads; helpers++) std::thread([this] { help(); }).detach();
        launch = &l;
        next = 0;
        count = left = l.grid.count();
        stride = count * 5 / 8 + 1;
        while (gcd(stride, count) != 1) stride++;
        offset = options().seed;
        if (count > 1) begin.notify_all();
        while (run_one(guard)) {
        }
        end.wait(guard, [this] { return left == 0; });
        launch = nullptr;
    }
};

inline void run_grid(const Launch &launch) {
    if (launch.grid.count() == 0 || launch.block.count() == 0) fail("a launch without blocks or threads");
    if (launch.block.count() > MAX_THREADS) fail("a launch with more than 1024 threads in a block");
    if (launch.shared > MAX_SHARED) fail("a launch with more shared memory than a block can have");
    Pool::get().run(launch);
}

// An argument as the kernel's parameter. Pointers may point to what they like.
template <class P, class A> P as_parameter(A argument) {
    if constexpr (std::is_pointer_v<P> && std::is_pointer_v<A>) {
        return (P)argument;
    } else {
        return static_cast<P>(argument);
    }
}

// Launches `kernel` on `grid` x `block` threads with `shared` bytes of dynamic shared memory, and returns when all
// have ended.
template <class... P, class... A>
void launch_named(const char *name, void (*kernel)(P...), Dim grid, Dim block, size_t shared, A... arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
    std::tuple<P...> values(as_parameter<P>(arguments)...);
    run_grid({name, grid, block, shared, [kernel, &values] { std::apply(kernel, values); }});
}

// Calls `test` for each order of threads and each moment of copies.
template <class F> void in_all_orders(F test) {
    Options before = options();
    for (Order order : {Order::Forward, Order::Reverse, Order::Shuffle}) {
        for (bool early : {false, true}) {
            options().order = order;
            options().copy_early = early;
            test();
        }
    }
    options() = before;
}

} // namespace lnv_emulator
