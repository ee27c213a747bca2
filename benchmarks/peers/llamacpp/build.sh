#!/usr/bin/env bash
# Builds llama.cpp (as the crates.io package llama-cpp-sys-2 holds it) and our driver into FOLDER.
#   build.sh FOLDER [JOBS]
# Needs cargo, a C++ compiler, cmake (`pip install cmake` will do; CMAKE=/path names one).
set -euo pipefail
version=0.1.161
folder=${1:?usage: build.sh FOLDER [JOBS]}
jobs=${2:-$(nproc)}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder/fetch/src"
folder=$(cd "$folder" && pwd)

# A package that only depends on it: cargo then fetches the source and says where it lies.
cat >"$folder/fetch/Cargo.toml" <<TOML
[package]
name = "fetch"
version = "0.0.0"
edition = "2021"
[dependencies]
llama-cpp-sys-2 = { version = "=$version", default-features = false }
[workspace]
TOML
: >"$folder/fetch/src/lib.rs"
source=$(cargo metadata --quiet --format-version 1 --manifest-path "$folder/fetch/Cargo.toml" |
    python3 -c 'import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "llama-cpp-sys-2":
        print(os.path.dirname(package["manifest_path"]))')

# A copy: configuring may write beside the source, and cargo's is shared.
rm -rf "$folder/llama.cpp"
cp -r "$source/llama.cpp" "$folder/llama.cpp"
"${CMAKE:-cmake}" -S "$here" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP="$folder/llama.cpp"
"${CMAKE:-cmake}" --build "$folder/build" --target llamacpp-bench --parallel "$jobs"
echo "llama-cpp-sys-2 $version" >"$folder/version"
cp "$folder/build/llamacpp-bench" "$folder/llamacpp-bench"
echo "built $folder/llamacpp-bench"
