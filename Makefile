# Every chore of the project. Each target does its own set-up; CONTRIBUTING.md says when to use which.

# rustup's programs, also where the shell does not know them.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)

CLIP ?= left.mp4
QUESTION ?= Which way does it move?

.PHONY: help setup build demo test check fmt clippy doc deny gates fuzz clean

help:
	@echo 'make demo    build, then ask the built-in model about a clip and check its answer'
	@echo 'make build   build the command lnv (release)'
	@echo 'make test    run all tests; needs cargo and system packages, nothing else'
	@echo 'make check   formatting, lints, documentation, licences of dependencies'
	@echo 'make gates   checks that need pip or npm'
	@echo 'make fuzz    run each fuzz target for FUZZ_SECONDS=30'
	@echo ''
	@echo 'Set-up (a C compiler, libclang, FFmpeg) is done where it is lacking.'
	@echo 'demo takes CLIP=file of testdata/demo and QUESTION="..."'

setup:
	@tools/setup/packages.sh

build: setup
	cargo build --release --locked --package lnv-cli
	@printf 'Built %s/release/lnv\n' "$$(tools/setup/target_dir.sh)"

demo: build
	@tools/setup/demo.sh '$(CLIP)' '$(QUESTION)'

test: setup
	cargo test --workspace --locked --no-fail-fast

check: fmt clippy doc deny

fmt:
	cargo fmt --all --check
	rustfmt --check --edition 2024 fuzz/fuzz_targets/*.rs fuzz/src/lib.rs

clippy: setup
	cargo clippy --workspace --all-targets --locked -- --deny warnings

doc: setup
	RUSTDOCFLAGS='--deny warnings' cargo doc --workspace --no-deps --document-private-items --locked

# Bans, licences and sources only: the list of advisories needs the network, and would make an
# unchanged commit fail from one day to the next.
deny:
	@tools/setup/cargo_deny.sh
	cargo fetch --locked --target x86_64-unknown-linux-gnu
	cargo deny --offline --locked check bans licenses sources

gates: setup
	@tools/gates/run

FUZZ_SECONDS ?= 30
fuzz: setup
	@fuzz/run $(FUZZ_SECONDS)

clean:
	cargo clean
