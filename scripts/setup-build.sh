#!/usr/bin/env bash
# What a build needs: a Rust toolchain (rust-toolchain.toml names the version), a C tool chain for librdkafka, and RocksDB.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

have cargo || fail "cargo is not on the PATH: install Rust with rustup, then try again"
packages cmake g++ make pkg-config libcurl4-openssl-dev libssl-dev zlib1g-dev libclang-dev
"$(dirname "$0")/setup-rocksdb.sh"
