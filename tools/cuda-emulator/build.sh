#!/usr/bin/env bash
# Builds libcuda.so.1, the CUDA driver that runs this project's kernels on the processor, into the folder $1, and
# prints its path; `LD_LIBRARY_PATH=that folder` makes a program find it. What is newer than its sources is kept.
#
# Each file of kernels becomes one source: the file in an anonymous namespace, then a line for each entry point. Their
# names are found by preprocessing, so macros may make them. CXX and KERNELS: see flags.sh.
set -euo pipefail
[ $# = 1 ] || { echo "usage: build.sh OUT_DIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
source "$here/flags.sh"
flags+=(-fPIC -fvisibility=hidden)
mkdir -p "$1"
out=$(cd "$1" && pwd)
objects=$out/emulator-objects
mkdir -p "$objects"

# Makes the source of a file of kernels, and compiles it.
compile_kernels() {
    local file=$1 name
    name=$(basename "$file")
    local source=$objects/$name.cpp
    {
        echo '#include "registry.hpp"'
        echo '#include "builtins.hpp"'
        echo 'namespace {'
        echo '#include "emulator.hpp"'
        echo "#include \"$name\""
        echo '#undef launch'
    } >"$source.head"
    # A file may define no kernel.
    "$cxx" "${flags[@]}" -DLNV_LISTING -E -P -x c++ "$source.head" |
        { grep -oE 'LNV_ENTRY +void +[A-Za-z_0-9]+' || true; } | awk '{print "REGISTER(" $3 ")"}' >"$source.names"
    {
        cat "$source.head" "$source.names"
        echo '}'
    } >"$source"
    "$cxx" "${flags[@]}" -c "$source" -o "$objects/$name.o"
}
is_new() { # object, sources...
    local object=$1 source
    shift
    [ -e "$object" ] || return 1
    for source in "$@"; do
        [ "$object" -nt "$source" ] || return 1
    done
}

headers=("$here"/*.hpp "$here"/*.sh "$ours/prelude.cu")
wanted=()
jobs=()
for file in "$kernels"/*.cu "$here/driver.cpp"; do
    name=$(basename "$file")
    [ "$name" != prelude.cu ] || continue
    wanted+=("$objects/$name.o")
    is_new "$objects/$name.o" "$file" "${headers[@]}" && continue
    rm -f "$objects/$name.o"
    if [[ $file == *.cu ]]; then
        compile_kernels "$file" &
    else
        "$cxx" "${flags[@]}" -c "$file" -o "$objects/$name.o" &
    fi
    jobs+=($!)
    if [ ${#jobs[@]} -ge "$(nproc)" ]; then
        wait "${jobs[0]}"
        jobs=("${jobs[@]:1}")
    fi
done
for job in "${jobs[@]}"; do wait "$job"; done
"$cxx" -shared -pthread -Wl,-soname,libcuda.so.1 -Wl,-z,nodelete "${wanted[@]}" -o "$out/libcuda.so.1.new"
mv "$out/libcuda.so.1.new" "$out/libcuda.so.1"
echo "$out/libcuda.so.1"
