#!/bin/sh
# Installs cargo-deny where it is lacking. Built without optimisation: it runs for a second, and an
# optimised build takes several times as long as all that it will ever save.
set -eu
cargo deny --version >/dev/null 2>&1 && exit 0
echo 'Installing cargo-deny' >&2
CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=false \
    CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 cargo install --locked cargo-deny >&2
