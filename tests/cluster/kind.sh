#!/usr/bin/env bash
# The orders of namespaces.sh by means of kind, where Docker runs on this machine:
#   kind.sh up [--name NAME] [--nodes N]      N nodes take pods; the first is the control plane's, too
#   kind.sh down [--name NAME]
#   kind.sh load [--name NAME] TAR...
#   kind.sh node [--name NAME] list | stop NODE | start NODE | enter NODE COMMAND...
# A node is a container, and is called as kubectl calls it: NAME-control-plane, NAME-worker, NAME-worker2, ...
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"

READY_WITHIN=180s
CONTROL_PLANE="node-role.kubernetes.io/control-plane"

order=${1:-}
shift || true
clusters="$FLOODMARK_CACHE/kind-clusters"
take_name "$@"
shift "$shifted"
usage() { fail "usage: kind.sh up [--nodes N] | down | load TAR... | node list | node stop|start NODE | node enter NODE COMMAND..., each with [--name NAME] first"; }

have docker || fail "kind needs Docker: install Docker Engine, or use a cluster without it (make cluster, make e2e)"
docker info >/dev/null 2>&1 || fail "Docker does not run here, or you may not use it ('docker info' says why): start it, or use a cluster without it (make cluster, make e2e)"
have kind || fail "kind is not installed: 'go install sigs.k8s.io/kind@latest' (0.24 or newer), or use a cluster without it (make cluster, make e2e)"
have kubectl || fail "kubectl is not installed: https://kubernetes.io/docs/tasks/tools/ says how to get it"

is_there() { kind get clusters 2>/dev/null | grep -x -- "$name" >/dev/null; }
must_be_there() { is_there || fail "no cluster '$name' of kind is up: make cluster CLUSTER=kind"; }
nodes_of() { kind get nodes --name "$name" 2>/dev/null; }
must_be_node_of() { nodes_of | grep -x -- "$1" >/dev/null || fail "the nodes of '$name' are $(nodes_of | sort | xargs), not '$1'"; }
k() { kubectl --kubeconfig "$state/kubeconfig" "$@"; }

configuration() {
  local i
  printf 'kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnodes:\n  - role: control-plane\n'
  for ((i = 1; i < $1; i++)); do printf '  - role: worker\n'; done
}

# kind lets pods onto the node of the control plane only if there is no other.
open_control_plane() {
  local closed
  closed=$(k get nodes --selector "$CONTROL_PLANE" -o 'jsonpath={.items[*].spec.taints[*].key}')
  [[ " $closed " != *" $CONTROL_PLANE "* ]] || k taint nodes --selector "$CONTROL_PLANE" "$CONTROL_PLANE-" >&2
}

# The address of this machine for pods: of the gateways of kind's network the one that is not of IPv6.
gateway() {
  docker network inspect kind --format '{{range .IPAM.Config}}{{println .Gateway}}{{end}}' | grep -m 1 -F .
}

up() {
  local nodes=1 host there
  case "${1:-}" in
    '') ;;
    --nodes) nodes="${2:?--nodes wants a number}" ;;
    *) usage ;;
  esac
  [[ $nodes =~ ^[0-9]+$ && $nodes -ge 1 && $nodes -le $NODES_MAX ]] || fail "a cluster has 1 to $NODES_MAX nodes, not '$nodes'"
  mkdir -p "$state"
  if is_there; then
    there=$(nodes_of | wc -l)
    [ "$there" -eq "$nodes" ] ||
      fail "cluster '$name' is up with $there nodes, not $nodes: end it first (tests/cluster/kind.sh down --name $name)"
    say "cluster '$name' is up already"
  else
    configuration "$nodes" | kind create cluster --name "$name" --kubeconfig "$state/kubeconfig" --config - --wait "$READY_WITHIN" >&2 ||
      fail "kind could not bring up cluster '$name': see above"
  fi
  # Said anew each time: an earlier order may have been interrupted here.
  (umask 077 && kind get kubeconfig --name "$name" >"$state/kubeconfig")
  open_control_plane
  host=$(gateway) || fail "Docker's network 'kind' has no gateway"
  cat >"$state/env" <<Y
KUBECONFIG=$state/kubeconfig
FLOODMARK_CLUSTER=$name
FLOODMARK_CLUSTER_NODES=$nodes
FLOODMARK_CLUSTER_HOST=$host
FLOODMARK_CLUSTER_SCRIPT=$here/kind.sh
Y
  printf '%s\n' "$state/kubeconfig"
}

node() {
  local order=${1:-list} node=${2:-}
  must_be_there
  [ "$order" = list ] || must_be_node_of "$node"
  case "$order" in
    list) docker ps --all --filter "label=io.x-k8s.kind.cluster=$name" --format '{{.Names}} {{.State}}' | sort ;;
    # No time to end in order: a power cut.
    stop) docker stop -t 0 "$node" >/dev/null ;;
    start) docker start "$node" >/dev/null ;;
    enter)
      shift 2
      docker exec --interactive "$node" "${@:-bash}"
      ;;
    *) usage ;;
  esac
}

case "$order" in
  up) up "$@" ;;
  down)
    kind delete cluster --name "$name" >&2
    rm -rf "$state"
    ;;
  load)
    [ $# -gt 0 ] || usage
    must_be_there
    for image in "$@"; do
      [ -r "$image" ] || fail "there is no image at $image"
      kind load image-archive "$image" --name "$name" >&2
    done
    ;;
  node) node "$@" ;;
  *) usage ;;
esac
