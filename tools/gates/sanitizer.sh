#!/usr/bin/env bash
# Runs the kernels' tests under AddressSanitizer: every implementation that the machine has, on odd shapes,
# with each read and write checked, and Rust's own checks, which other builds of the kernels leave out: overflow, and
# what `unsafe` functions of the standard library ask. The compiler needs leave for the flag; its runtime comes with
# Rust.
# The largest sizes are left out for their time. What AMX's own instructions read and write, which are
# assembly, is not seen.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
host=$(rustc -vV | sed -n 's/^host: //p')
runtime=$(rustc --print sysroot)/lib/rustlib/$host/lib/librustc-stable_rt.asan.a

if [ ! -e "$runtime" ]; then
    echo "skipped: this Rust has no AddressSanitizer for $host ($runtime)"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
of_kernels=profile.dev.package.lnv-kernels
checks=(--config "$of_kernels.overflow-checks=true" --config "$of_kernels.debug-assertions=true")
# What is kept for the next call is no leak.
RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 CARGO_TARGET_DIR=$folder \
    cargo test "${checks[@]}" --quiet --locked --manifest-path "$root/Cargo.toml" --package lnv-kernels \
    --target "$host" --lib --tests -- --skip large_sizes --skip chunking
