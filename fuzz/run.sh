#!/usr/bin/env bash
# Runs every fuzz target for some seconds ($1, 60 if none are named), or those that are named behind it, and says how often each
# was executed and what was found. What the fuzzer learns is kept in the cache; inputs that fail are kept in fuzz/artifacts/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

CARGO_FUZZ_VERSION=0.13.2

seconds="${1:-60}"
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- $(basename -s .rs fuzz/fuzz_targets/*.rs)

rustup run nightly rustc --version >/dev/null 2>&1 || fail "fuzzing needs a nightly toolchain: rustup toolchain install nightly"
have cargo-fuzz || cargo install --quiet --locked --root "$FLOODMARK_CACHE/tools" "cargo-fuzz@$CARGO_FUZZ_VERSION"
# All of it is safe Rust: what a sanitizer would look for can't happen, and it would triple the time to build.
export CARGO_TARGET_DIR="$FLOODMARK_CACHE/fuzz/target"
cargo +nightly fuzz build --sanitizer none

failed=()
for target in "$@"; do
  learnt="$FLOODMARK_CACHE/fuzz/corpus/$target"
  log="$FLOODMARK_CACHE/fuzz/$target.log"
  mkdir -p "$learnt"
  if cargo +nightly fuzz run --sanitizer none "$target" "$learnt" "fuzz/corpus/$target" -- \
    -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 -verbosity=0 >"$log" 2>&1; then
    found="nothing found"
  else
    found="FAILED: see $log"
    failed+=("$target")
  fi
  say "fuzz: $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") executions in $seconds s: $found"
done
[ ${#failed[@]} -eq 0 ] || fail "fuzz: ${failed[*]} failed"
