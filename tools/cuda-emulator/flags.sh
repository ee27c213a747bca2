# The compiler and its flags for kernels on the processor; build.sh and run_test.sh source it, with `here` set. CXX
# names another compiler than clang++, KERNELS another folder of kernels.
ours=$(cd "$here/../../crates/lnv-kernels/src/cuda/kernels" && pwd)
kernels=$(cd "${KERNELS:-$ours}" && pwd)
cxx=${CXX:-$(command -v clang++ || command -v g++)}
flags=(-std=c++17 -O2 -pthread -Wall -Wno-unused-function -Wno-unknown-pragmas -Wno-parentheses -ffp-contract=off "-I$here" "-I$kernels" "-I$ours")
# Kernels read arrays by other types than they were written by; lines are for faults.
flags+=(-fno-strict-aliasing -g1)
# What a GPU faults at or leaves undefined ends in a trap, which faults.hpp names; a frame larger than the page that
# guards a stack does not leap over it.
flags+=("-fsanitize=alignment,bounds,shift-exponent,signed-integer-overflow,integer-divide-by-zero"
    -fsanitize-undefined-trap-on-error -fstack-clash-protection)
# The processor's own instructions make products of matrices several times faster; no arithmetic changes by it.
if echo | "$cxx" -march=native -E - >/dev/null 2>&1; then flags+=(-march=native); fi
case $("$cxx" --version) in *clang*) flags+=(-Wno-pass-failed) ;; esac
