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
bash "$emulator/build.sh" "$folder/emulator"
# One on each processor: a compiler has one thread.
printf '%s\0' "$emulator"/tests/*.cpp | xargs -0 -n 1 -P "$(nproc)" bash "$emulator/run_test.sh"
# The operations of the kernels' crate, and goldens of whole models, on the emulated device.
export LNV_CUDA_PATH=$folder/emulator LNV_DEVICE=cuda
cargo test --quiet --manifest-path "$root/Cargo.toml" --workspace --locked --test harness -- cuda
cargo test --quiet --manifest-path "$root/Cargo.toml" --workspace --locked --test model_golden -- forward
