#!/usr/bin/env bash
# Builds the emulated CUDA device with all kernels, and tests it by kernels of its own; skipped without a C++ compiler.
source "$(dirname "$0")/common/gate.sh"
if ! command -v "${CXX:-clang++}" >/dev/null && ! command -v g++ >/dev/null; then
    echo "skipped: no C++ compiler"
    exit 0
fi
emulator=$root/tools/cuda-emulator
bash "$emulator/run_test.sh" "$emulator/selftest.cpp"
KERNELS=$emulator/selftest_kernels bash "$emulator/build.sh" "$folder/selftest"
python3 -B "$emulator/driver_test.py" "$folder/selftest/libcuda.so.1"
# A script and its argument at a time, one more than there are processors: the emulator's longest file and the longest
# test have one thread each.
{
    printf '%s\0' "$emulator/build.sh" "$folder/emulator"
    for test in "$emulator"/tests/*.cpp; do
        printf '%s\0' "$emulator/run_test.sh" "$test"
    done
} | xargs -0 -n 2 -P "$(($(nproc) + 1))" bash
# The operations of the kernels' crate, and goldens of whole models, on the emulated device.
export LNV_CUDA_PATH=$folder/emulator LNV_DEVICE=cuda
cargo test --quiet --manifest-path "$root/Cargo.toml" --workspace --locked --test harness -- cuda
cargo test --quiet --manifest-path "$root/Cargo.toml" --workspace --locked --test model_golden -- forward
