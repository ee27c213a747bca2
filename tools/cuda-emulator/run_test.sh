#!/usr/bin/env bash
# Compiles a test of kernels (see emulator.hpp) with the emulator's flags, and runs it: run_test.sh TEST.cpp [ARGUMENT ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/flags.sh"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$cxx" "${flags[@]}" "$1" -o "$folder/test"
"$folder/test" "${@:2}"
