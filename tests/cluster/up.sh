#!/usr/bin/env bash
# Brings up a real Kubernetes cluster on this machine:
#   up.sh [--name NAME] [--nodes N]     1 node unless told; says so if it is up already
# On standard output: the path of its kubeconfig. What tests need to know is in the file `env` beside it.
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"
# shellcheck source=tests/cluster/nodes.sh
. "$here/nodes.sh"

READY_SECONDS_MAX=${FLOODMARK_CLUSTER_READY_SECONDS:-120}
# Subnets are tried from here on.
FIRST_SUBNET=64 LAST_SUBNET=127
KUBERNETES_API=6443

become_root "$@"
take_name "$@"
shift "$shifted"
nodes=1
case "${1:-}" in
  '') ;;
  --nodes) nodes="${2:?--nodes wants a number}" ;;
  *) fail "usage: up.sh [--name NAME] [--nodes N]" ;;
esac
[[ $nodes =~ ^[0-9]+$ && $nodes -ge 1 && $nodes -le $NODES_MAX ]] || fail "a cluster has 1 to $NODES_MAX nodes, not '$nodes'"
wanted=$nodes
installed=$("$repository/scripts/setup-cluster.sh" --where)
[ -d "$installed" ] || fail "the cluster's programs are not built: run scripts/setup-cluster.sh first (make cluster does)"

mkdir -p "$clusters"
exec 9>"$lock"
flock --nonblock 9 || { say "waiting for another command on cluster '$name'"; flock 9; }

if is_up; then
  [ "$nodes" = "$wanted" ] || fail "cluster '$name' is up with $nodes nodes, not $wanted: end it first (tests/cluster/down.sh --name $name)"
  say "cluster '$name' is up already"
  printf '%s\n' "$state/kubeconfig"
  exit
fi
# What a reboot, a crash or a kill has left.
"$here/down.sh" --name "$name" --locked

# Nothing half made is left behind; the last words of the programs are.
failed() {
  local code=$?
  trap - EXIT INT TERM
  [ "$code" != 0 ] || return 0
  rm -rf "$clusters/$name.failed"
  [ ! -d "$state/log" ] || { cp -r "$state/log" "$clusters/$name.failed" && say "what its programs said is in $clusters/$name.failed"; }
  "$here/down.sh" --name "$name" --locked || true
  exit "$code"
}
trap failed EXIT
trap 'exit 130' INT TERM
started=$EPOCHREALTIME
since() { awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f s", b - a }'; }

mkdir -p "$state"/{log,pki,programs,tmp}
chmod 711 "$state"
chmod 1777 "$state/tmp"
printf '%s\n' "$wanted" >"$state/nodes"
nodes=$wanted

# The subnet is taken as soon as a route leads to it; until then nobody else may choose one.
lay_network() {
  local candidate
  exec 8>"$locks/floodmark-cluster-subnets.lock"
  flock 8
  for ((candidate = FIRST_SUBNET; candidate <= LAST_SUBNET; candidate++)); do
    if [ -z "$(ip -4 route show root "10.$candidate.0.0/16")" ] && [ ! -e "/run/netns/fmk$candidate" ] &&
      ! ip -4 route show match "10.$candidate.0.0/16" | grep -v '^default' >/dev/null; then
      break
    fi
  done
  [ "$candidate" -le "$LAST_SUBNET" ] || fail "no subnet of 10.$FIRST_SUBNET.0.0 to 10.$LAST_SUBNET.0.0 is free: see ip route"
  printf '%s\n' "$candidate" >"$state/subnet"
  recall
  # The switch is in a namespace of its own: packet filters of this machine (Docker's refuse what crosses a bridge) are none of
  # its business. This machine has a cable to it like everybody.
  ip netns add "$link"
  ip -n "$link" link add switch type bridge
  ip -n "$link" link set switch up
  ip link add "$link" type veth peer name host netns "$link"
  ip -n "$link" link set host master switch up
  ip address add "$host/24" dev "$link"
  ip link set "$link" up
  exec 8>&-
}

# Certificates, and kubeconfigs that hold them: kubeadm makes them without a cluster.
kubeadm_for() {
  cat <<Y
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v$(kubernetes_version)
certificatesDir: $state/pki
encryptionAlgorithm: ECDSA-P256
controlPlaneEndpoint: $(node_address 0):$KUBERNETES_API
networking: {serviceSubnet: $services, podSubnet: $pods}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: $(node_address 0), bindPort: $KUBERNETES_API}
nodeRegistration: {name: $1, criSocket: unix:///run/containerd/containerd.sock}
Y
}
kubernetes_version() { basename "$installed" | sed 's/^cluster-\([0-9.]*\)-.*/\1/'; }
certify() {
  local i part config="$state/kubeadm.yaml"
  mkdir -p "$state/node-0"
  kubeadm_for node-0 >"$config"
  "$installed/bin/kubeadm" init phase certs all --config "$config"
  for part in admin super-admin controller-manager scheduler; do
    "$installed/bin/kubeadm" init phase kubeconfig "$part" --config "$config" --kubeconfig-dir "$state/pki"
  done
  for ((i = 0; i < nodes; i++)); do
    mkdir -p "$state/node-$i"
    kubeadm_for "node-$i" >"$config"
    "$installed/bin/kubeadm" init phase kubeconfig kubelet --config "$config" --kubeconfig-dir "$state/node-$i"
  done
}

say "bringing up cluster '$name' ($nodes nodes, Kubernetes $(kubernetes_version))"
printf '%s\n' "$installed" >"$state/installed"
lay_network
cgroup_parents >"$state/cgroups"
if only_unified_cgroups; then
  read -r root <"$state/cgroups"
  cp "$root/cgroup.subtree_control" "$state/controllers"
  allow_controllers "$root" || fail "cgroups below $root can't have limits: is this a container? Run this on the machine itself"
fi
certify >"$state/log/kubeadm.log" 2>&1 || fail "certificates could not be made: $(tail -n 1 "$state/log/kubeadm.log")"
for ((i = 0; i < nodes; i++)); do start_node "$i"; done
say "nodes are running ($(since))"

deadline=$((SECONDS + READY_SECONDS_MAX))
# until_ready WHAT COMMAND...: tries until the command succeeds.
until_ready() {
  local what=$1 said
  shift
  until said=$("$@" 2>&1); do
    [ "$SECONDS" -lt "$deadline" ] || fail "after $READY_SECONDS_MAX s $what is not ready: ${said:-no word of it}"
    runs 0 || fail "node 0 has ended: $(tail -n 3 "$state/log/node-0.log")"
    sleep 0.2
  done
}
port_answers() { (: <"/dev/tcp/$(node_address 0)/$KUBERNETES_API"); }
root_kubectl() { "$installed/bin/kubectl" --kubeconfig "$state/pki/super-admin.conf" "$@"; }
objects() { sed "s/@DNS@/$dns/; s/@NODE_0@/$(node_address 0)/" "$here/objects.yaml"; }
apply_objects() { objects | root_kubectl apply -f -; }
all_nodes_are_there() { [ "$(root_kubectl get nodes -o name | wc -l)" = "$nodes" ]; }
nodes_are_ready() {
  all_nodes_are_there && root_kubectl wait --for=condition=Ready nodes --all --timeout="$((deadline - SECONDS))s"
}
default_account_is_there() { root_kubectl get serviceaccount default; }

until_ready "the API server" port_answers
until_ready "the API server" apply_objects
say "API server is ready ($(since))"
until_ready "some node" nodes_are_ready
until_ready "the default namespace" default_account_is_there
# As everywhere, for those who ask which node that is.
root_kubectl label --overwrite node node-0 node-role.kubernetes.io/control-plane= >/dev/null

install -m 600 "$state/pki/admin.conf" "$state/kubeconfig"
cat >"$state/env" <<Y
KUBECONFIG=$state/kubeconfig
FLOODMARK_CLUSTER=$name
FLOODMARK_CLUSTERS=$clusters
FLOODMARK_CLUSTER_NODES=$nodes
FLOODMARK_CLUSTER_HOST=$host
FLOODMARK_CLUSTER_BIN=$installed/bin
FLOODMARK_CLUSTER_SCRIPT=$here/namespaces.sh
Y
[ -z "${SUDO_UID:-}" ] || chown "$SUDO_UID:${SUDO_GID:-0}" "$state/kubeconfig"
touch "$state/ready"
say "cluster '$name' is ready ($(since)); pods reach servers on this machine at $host"
printf '%s\n' "$state/kubeconfig"
