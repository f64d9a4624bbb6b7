#!/usr/bin/env bash
# The same as up.sh, down.sh and load.sh by means of kind, where Docker runs and kind is installed:
#   kind.sh up [--name NAME] [--nodes N] | down [--name NAME] | load [--name NAME] TAR...
# A node is stopped and started with `docker stop` and `docker start` of the container NAME-worker, NAME-worker2, ...
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"

order=${1:-}
shift || true
clusters="$FLOODMARK_CACHE/kind-clusters"
take_name "$@"
shift "$shifted"
docker info >/dev/null 2>&1 || fail "Docker does not run here: use a cluster without it (make cluster)"
have kind || fail "kind is not installed: install it, or use a cluster without it (make cluster)"

is_there() { kind get clusters 2>/dev/null | grep -x -- "$name" >/dev/null; }

up() {
  local nodes=1 i host
  if [ "${1:-}" = --nodes ]; then nodes="${2:?--nodes wants a number}"; fi
  if is_there; then
    say "cluster '$name' is up already"
  else
    mkdir -p "$state"
    {
      printf 'kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnodes:\n  - role: control-plane\n'
      for ((i = 1; i < nodes; i++)); do printf '  - role: worker\n'; done
    } | kind create cluster --name "$name" --kubeconfig "$state/kubeconfig" --config - --wait 180s >&2 ||
      fail "kind could not bring up cluster '$name': see above"
    # Of the network's gateways, the one that is not of IPv6.
    host=$(docker network inspect kind --format '{{range .IPAM.Config}}{{println .Gateway}}{{end}}' | grep -m 1 -F .) ||
      fail "Docker's network 'kind' has no gateway"
    printf 'KUBECONFIG=%s\nFLOODMARK_CLUSTER=%s\nFLOODMARK_CLUSTER_NODES=%s\nFLOODMARK_CLUSTER_HOST=%s\n' \
      "$state/kubeconfig" "$name" "$nodes" "$host" >"$state/env"
  fi
  printf '%s\n' "$state/kubeconfig"
}

case "$order" in
  up) up "$@" ;;
  down)
    kind delete cluster --name "$name" >&2
    rm -rf "$state"
    ;;
  load)
    [ $# -gt 0 ] || fail "usage: kind.sh load [--name NAME] TAR..."
    for image in "$@"; do kind load image-archive "$image" --name "$name" >&2; done
    ;;
  *) fail "usage: kind.sh up [--name NAME] [--nodes N] | down [--name NAME] | load [--name NAME] TAR..." ;;
esac
