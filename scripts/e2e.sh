#!/usr/bin/env bash
# The operator on a real cluster, from its image and its chart: brings a cluster up, runs the scenarios of
# tests/tests/kubernetes/ against it, and ends it.
#   e2e.sh [SCENARIO]      only scenarios whose name has this in it
#   CLUSTER=kind           a cluster of kind's in Docker, not one of namespaces
#   E2E_KEEP=1             the cluster stays, for a look and for a quicker next run
#   E2E_IMAGE=FILE         an image that is there already, as `docker save` writes it
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
# shellcheck source=scripts/lib.sh
. "$here/scripts/lib.sh"

export FLOODMARK_CLUSTER="${FLOODMARK_CLUSTER:-e2e}"
cluster="$here/tests/cluster/${CLUSTER:-namespaces}.sh"
[ -x "$cluster" ] || fail "there are no clusters of '$CLUSTER': CLUSTER is namespaces or kind"
"$here/scripts/setup-test.sh"
finish() {
  local code=$?
  if [ "$code" -ne 0 ] && [ -n "${FLOODMARK_CLUSTER_HOST:-}" ]; then
    say "the controller's last words:"
    kubectl -n floodmark-system logs -l app.kubernetes.io/name=floodmark-controller --tail=40 --prefix >&2 || true
  fi
  [ -n "${E2E_KEEP:-}" ] || "$cluster" down
}
kubeconfig=$("$cluster" up --nodes 3)
trap finish EXIT
set -a
# shellcheck source=/dev/null
. "$(dirname "$kubeconfig")/env"
set +a
# The tests' cluster brings kubectl and helm; with another they are the user's.
PATH="${FLOODMARK_CLUSTER_BIN:+$FLOODMARK_CLUSTER_BIN:}$PATH"
for tool in kubectl helm; do have "$tool" || fail "$tool is not installed, and this cluster does not bring it: install it"; done
ip -4 -o address show | grep -F " $FLOODMARK_CLUSTER_HOST/" >/dev/null ||
  fail "pods would look for Kafka and S3 at $FLOODMARK_CLUSTER_HOST, which is no address of this machine: nodes must run on it, not in a virtual machine of Docker's"
image=${E2E_IMAGE:-$("$here/tests/cluster/image/build.sh" | tail -n 1)}
"$cluster" load "$image"
say "installing the chart"
helm upgrade --install floodmark "$here/charts/floodmark" --namespace floodmark-system --create-namespace \
  --set clusterWide=true --wait --timeout 120s >&2
# So that a new build of the same version is taken.
kubectl -n floodmark-system rollout restart deployment >/dev/null
kubectl -n floodmark-system rollout status deployment --timeout=120s >&2
cd "$here"
cargo test --workspace --locked --test kubernetes -- --ignored --nocapture --test-threads="${E2E_THREADS:-2}" "${@:1}"
