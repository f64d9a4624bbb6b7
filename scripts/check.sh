#!/usr/bin/env bash
# Every rule that a program can check. Stops at the first that is broken.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

skipped=()
step() { say "check: $1"; }

step "formatting"
cargo fmt --all --check

step "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings

step "documentation"
# Nobody but us reads these: links to private items are fine.
RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --workspace --no-deps --document-private-items --locked --quiet

step "crds/*.yaml are what the Rust types say"
cargo run --quiet --locked -p floodmark-crds --bin crdgen -- --check crds

step "docs/openapi.json is what the Rust types say"
cargo run --quiet --locked -p floodmark-worker --bin apigen -- --check docs/openapi.json

step "shell scripts"
for script in scripts/*.sh .ci/run; do bash -n "$script"; done

step "unused dependencies"
if have cargo-shear; then cargo-shear; else skipped+=("unused dependencies (no cargo-shear)"); fi

step "licences, sources and bans of dependencies"
if have cargo-deny; then
  cargo-deny --locked check --hide-inclusion-graph licenses bans sources
  step "known advisories"
  # The database is fetched over the network. An advisory is an error; a database that can't be had is not.
  if report=$(cargo-deny --locked check --hide-inclusion-graph advisories 2>&1); then :
  elif grep -q '^error\[' <<<"$report"; then printf '%s\n' "$report" >&2; exit 1
  else skipped+=("advisories (their database can't be reached)")
  fi
else
  skipped+=("licences, sources and bans (no cargo-deny)")
fi

for what in ${skipped[@]+"${skipped[@]}"}; do say "check: SKIPPED $what"; done
say "check: all passed"
