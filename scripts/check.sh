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

step "crds/*.yaml and docs/openapi.json are what the Rust types say"
# As parts of the workspace: by themselves they would want other features, and all that they depend on anew.
cargo build --quiet --locked --workspace --bin crdgen --bin apigen --example manifests
built="${CARGO_TARGET_DIR:-target}/debug"
"$built/crdgen" --check crds
# Charts can only read what is in their own folder.
"$built/crdgen" --check charts/floodmark/generated
"$built/apigen" --check docs/openapi.json

step "shell scripts"
git ls-files '*.sh' .ci/run | while read -r script; do bash -n "$script"; done

step "chart"
# What it renders with and without all that can be switched on, against the types of Kubernetes and the restricted profile.
chart=charts/floodmark helm=$(command -v helm || echo "$(scripts/setup-cluster.sh --where)/bin/helm")
if [ -x "$helm" ]; then
  rendered() { "$helm" template floodmark "$chart" --namespace streams --kube-version 1.33.0 "$@"; }
  for values in values.yaml ci/bare.yaml ci/cluster-wide.yaml ci/everything.yaml; do
    lint=$("$helm" lint --quiet --strict "$chart" --values "$chart/$values") || { printf '%s\n' "$lint" >&2; exit 1; }
    rendered --values "$chart/$values" | "$built/examples/manifests"
  done
  for wrong in replica=1 clusterWide=true,watchNamespaces={a} webhook.timeoutSeconds=60; do
    ! rendered --set "$wrong" >/dev/null 2>&1 || fail "the chart takes $wrong"
  done
else skipped+=("chart (no helm: scripts/setup-cluster.sh brings it)")
fi

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
