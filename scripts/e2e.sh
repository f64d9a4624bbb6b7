#!/usr/bin/env bash
# The operator on a real cluster, from its image and its chart: brings a cluster up, runs the scenarios of
# tests/tests/kubernetes.rs against it, and ends it. With E2E_KEEP=1 the cluster stays, for a look and for a quicker next run.
#   e2e.sh [SCENARIO]      only scenarios whose name has this in it
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

export FLOODMARK_CLUSTER="${FLOODMARK_CLUSTER:-e2e}"
clusters="${FLOODMARK_CLUSTERS:-/var/lib/floodmark-clusters}"
"$here/scripts/setup-test.sh"
"$here/scripts/setup-cluster.sh"
image=$("$here/tests/cluster/image/build.sh" | tail -n 1)
finish() {
  local code=$?
  if [ "$code" -ne 0 ] && [ -n "${KUBECONFIG:-}" ]; then
    say "the controller's last words:"
    kubectl -n floodmark-system logs -l app.kubernetes.io/component=controller --tail=40 --prefix >&2 || true
  fi
  [ -n "${E2E_KEEP:-}" ] || "$here/tests/cluster/down.sh"
}
"$here/tests/cluster/up.sh" --nodes 3
trap finish EXIT
set -a
# shellcheck source=/dev/null
. "$clusters/$FLOODMARK_CLUSTER/env"
set +a
PATH="$FLOODMARK_CLUSTER_BIN:$PATH"
"$here/tests/cluster/load.sh" "$image"
say "installing the chart"
helm upgrade --install floodmark "$here/charts/floodmark" --namespace floodmark-system --create-namespace \
  --set clusterWide=true --wait --timeout 120s >&2
# So that a new build of the same version is taken.
kubectl -n floodmark-system rollout restart deployment >/dev/null
kubectl -n floodmark-system rollout status deployment --timeout=120s >&2
cd "$here"
cargo test --locked -p floodmark-tests --test kubernetes -- --ignored --nocapture --test-threads="${E2E_THREADS:-2}" "${@:1}"
