#!/bin/sh
# Prints cargo's target directory, whichever of its settings decides it.
set -eu
cd "$(dirname "$0")/../.."
cargo metadata --format-version 1 --no-deps --offline --locked |
    sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
