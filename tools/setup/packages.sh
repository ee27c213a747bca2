#!/bin/sh
# Sees to what the build needs beside cargo's crates: a Rust toolchain, a C compiler, libclang (for the
# FFmpeg bindings) and FFmpeg's development files. Installs missing system packages with apt when it
# may; otherwise says what to install and fails. Says nothing and calls no package manager when all is
# there.
#
#   packages.sh           check, and install what is missing
#   packages.sh --check   check only
set -eu

# Oldest supported Rust, as `rust-version` in Cargo.toml.
rust_minor=89

packages='gcc libc6-dev pkg-config clang libclang-dev
libavcodec-dev libavformat-dev libavfilter-dev libavutil-dev libswscale-dev'
libraries='libavcodec libavformat libavfilter libavutil libswscale'

say() { printf '%s\n' "$*" >&2; }

have_program() { command -v "$1" >/dev/null 2>&1; }

have_libclang() {
    have_program clang || return 1
    for file in "${LIBCLANG_PATH:-/nonexistent}"/libclang*.so* /usr/lib/*/libclang*.so* \
        /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/libclang*.so* /usr/lib64/libclang*.so* \
        /usr/local/lib/libclang*.so*; do
        [ -e "$file" ] && return 0
    done
    return 1
}

# True when the build would find everything, however it was installed.
all_there() {
    have_program cc && have_program pkg-config && have_libclang || return 1
    # shellcheck disable=SC2086
    pkg-config --exists $libraries
}

check_rust() {
    if ! have_program cargo; then
        say "cargo is not installed. Install Rust 1.$rust_minor or later:"
        say "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y"
        say "then open a new shell, or run: . \"\$HOME/.cargo/env\""
        return 1
    fi
    minor=$(cargo --version | sed -n 's/^cargo 1\.\([0-9][0-9]*\)\..*/\1/p')
    if [ -n "$minor" ] && [ "$minor" -lt "$rust_minor" ]; then
        say "$(cargo --version) is too old: Rust 1.$rust_minor or later is needed. With rustup: rustup update stable"
        return 1
    fi
}

install_packages() {
    if ! have_program apt-get; then
        say "These are missing: a C compiler, pkg-config, libclang or FFmpeg's development files"
        say "($libraries). Install them with your system's package manager."
        return 1
    fi
    missing=''
    for package in $packages; do
        state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || missing="$missing $package"
    done
    if [ -z "$missing" ]; then
        say "All packages are installed, but pkg-config cannot find $libraries."
        say "Look at PKG_CONFIG_PATH and LIBCLANG_PATH."
        return 1
    fi
    if [ "$(id -u)" = 0 ]; then
        root=''
    elif have_program sudo && sudo -n true 2>/dev/null; then
        root='sudo'
    else
        say "System packages are missing and this user may not install them. Run as root:"
        say "    apt-get update && apt-get install -y --no-install-recommends$missing"
        return 1
    fi
    say "Installing$missing"
    # A package list may be stale or absent, so it is refreshed only when the first try fails.
    # shellcheck disable=SC2086
    apt_install $missing && return 0
    $root apt-get update >&2
    # shellcheck disable=SC2086
    apt_install $missing
}

apt_install() {
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >&2 </dev/null
}

check_rust
all_there && exit 0
if [ "${1:-}" = --check ]; then
    say "System packages are missing; needed are:" $packages
    exit 1
fi
install_packages
all_there || { say "The packages were installed, but the build's needs are still not met."; exit 1; }
