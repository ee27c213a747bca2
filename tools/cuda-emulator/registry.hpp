// The kernels that libcuda.so.1 holds, by name. build.sh writes, for each file of kernels, a source that includes it
// and ends with one REGISTER for each entry point.
#pragma once

#include "runtime.hpp"

#include <map>
#include <string>

namespace lnv_emulator {

struct Kernel {
    std::string name;
    std::vector<size_t> sizes;  // of the parameters
    std::vector<bool> pointers; // which of them are pointers
    // Copies the parameters from where the array points, and gives what calls the kernel with them.
    std::function<std::function<void()>(void *const *)> bind;
    size_t max_dynamic_shared = 48 * 1024;
    int registers = 0;       // of a thread, on a GPU; 0: not known
    size_t fixed_shared = 0; // bytes of `__shared__` arrays
};

inline std::map<std::string, Kernel> &kernels() {
    static auto *all = new std::map<std::string, Kernel>;
    return *all;
}

struct Registration {
    template <class... P> Registration(const char *name, void (*kernel)(P...)) {
        add(name, kernel, std::index_sequence_for<P...>());
    }

  private:
    template <class T> static T read(const void *at) {
        T x;
        memcpy(&x, at, sizeof x);
        return x;
    }
    template <class... P, size_t... I> static void add(const char *name, void (*kernel)(P...), std::index_sequence<I...>) {
        Kernel k;
        k.name = name;
        k.sizes = {sizeof(P)...};
        k.pointers = {std::is_pointer_v<P>...};
        k.bind = [kernel](void *const *parameters) -> std::function<void()> {
            (void)parameters;
            std::tuple<P...> values(read<P>(parameters[I])...);
            return [kernel, values] { std::apply(kernel, values); };
        };
        if (!kernels().emplace(name, std::move(k)).second) fail("two kernels have the same name");
    }
};

} // namespace lnv_emulator

#define REGISTER(name) static const ::lnv_emulator::Registration lnv_registration_##name(#name, name);
