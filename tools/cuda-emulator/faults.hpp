// Says which thread of which kernel did it when the processor refuses an access or a check fails.
//
// Decision: a handler for SIGSEGV, SIGBUS and SIGILL that looks whether a kernel is running on this thread: if so it
// writes a sentence and the place in the code, and aborts; if not, the signal is handed to whom it belonged to before.
// SIGILL comes from checks that the compiler puts in (build.sh: -fsanitize-trap), and carries which it was.
#pragma once

#include <dlfcn.h>
#include <signal.h>

namespace lnv_emulator {

// Whoever gives out memory can describe an address here; null: "an address that is nobody's".
inline void (*describe_address)(uintptr_t address, char *text, size_t bytes) = nullptr;

inline struct sigaction &action_before(int number) {
    static struct sigaction actions[65];
    return actions[number];
}

// clang's trap is `ud1l kind(%eax), %eax`, where `kind` says which of its checks failed.
inline const char *failed_check(const uint8_t *code) {
    if (code[0] != 0x67 || code[1] != 0x0f || code[2] != 0xb9) return "a check of the compiler failed";
    switch (code[3] == 0x40 ? code[4] : 0) {
    case 0:
    case 12:
    case 13:
    case 21: return "an int overflows";
    case 3: return "a division by zero, or an overflow of one";
    case 18: return "an index beyond its array";
    case 20: return "a shift by more bits than there are";
    case 22: return "an access to an address that is not aligned to its type";
    default: return "a check of the compiler failed";
    }
}

inline void describe_fault(const Worker &w, uintptr_t address, char *text, size_t bytes) {
    uintptr_t behind_shared = (uintptr_t)(w.arena + MAX_SHARED), stacks = (uintptr_t)w.stacks;
    if (address >= behind_shared && address < behind_shared + PAGE) {
        snprintf(text, bytes, "an access %zu bytes behind dynamic shared memory (%zu bytes)",
                 (size_t)(address - (uintptr_t)w.shared) - w.launch->shared, w.launch->shared);
    } else if (address >= stacks && address < stacks + MAX_THREADS * (STACK_BYTES + PAGE)) {
        snprintf(text, bytes, "the stack overflows (%zu bytes)", STACK_BYTES);
    } else if (describe_address) {
        describe_address(address, text, bytes);
    } else {
        snprintf(text, bytes, "an access to 0x%zx", (size_t)address);
    }
}

inline void on_fault(int number, siginfo_t *info, void *state) {
    if (!self) { // not ours
        sigaction(number, &action_before(number), nullptr);
        return; // and it happens again
    }
    uintptr_t code = 0;
#if defined(__x86_64__) && defined(REG_RIP)
    code = (uintptr_t)((ucontext_t *)state)->uc_mcontext.gregs[REG_RIP];
#else
    (void)state;
#endif
    char text[400];
    if (number == SIGILL) {
        snprintf(text, sizeof text, "%s", code ? failed_check((const uint8_t *)code) : "a check of the compiler failed");
    } else if (info->si_code == SI_KERNEL) {
        snprintf(text, sizeof text, "an access to an address that is not aligned to its type, or no address at all");
    } else {
        describe_fault(*self->worker, (uintptr_t)info->si_addr, text, sizeof text);
    }
    Dl_info where;
    if (code && dladdr((void *)code, &where) && where.dli_fname) {
        fprintf(stderr, "cuda emulator: at %#zx; with -g: addr2line -Cfie %s %#zx\n", (size_t)code, where.dli_fname,
                (size_t)(code - (uintptr_t)where.dli_fbase));
    }
    fail(text);
}

// Makes the handler known, once, and gives this thread a stack for it if it has none.
inline void watch_faults() {
    static bool once = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int number : {SIGSEGV, SIGBUS, SIGILL}) sigaction(number, &action, &action_before(number));
        return true;
    }();
    (void)once;
    stack_t stack = {};
    if (sigaltstack(nullptr, &stack) == 0 && !(stack.ss_flags & SS_DISABLE) && stack.ss_size >= 32768) return;
    stack = {};
    stack.ss_size = 65536;
    stack.ss_sp = malloc(stack.ss_size); // lives as long as the thread, which is as long as the program
    sigaltstack(&stack, nullptr);
}

} // namespace lnv_emulator
