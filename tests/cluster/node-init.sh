#!/usr/bin/env bash
# The first process of a node, in namespaces of its own: node-init.sh CLUSTER NODE. nodes.sh starts it, nobody else.
#
# Sets up what a machine has before Kubernetes comes, starts containerd, kubelet and kube-proxy, on node 0 the control plane
# before, and keeps them running. Ends when it is killed, and the kernel ends with it whatever it has started.
# Invariant: nothing that it writes or mounts is seen outside the node, but for the cluster's folder.
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"
name=$1 number=$2
locate
recall
export PATH="/mnt/programs/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
unset KUBECONFIG NOTIFY_SOCKET
address=$(node_address "$number")
api=$(node_address 0)

# The cluster's folder is at /mnt in every node, so that what is mounted over other folders can't hide it.
mount --make-rprivate /
mount --bind "$(<"$state/installed")" "$state/programs"
mount --rbind "$state" /mnt
me="/mnt/node-$number" pki=/mnt/pki
cd /

# keep NAME COMMAND...: runs a program, again whenever it ends. Its output is in the file NAME.
keep() {
  local log="/mnt/log/$1-$number.log"
  shift
  while :; do
    "$@" >>"$log" 2>&1 && code=0 || code=$?
    printf -- '--- ended with %s, started again\n' "$code" >>"$log"
    sleep 1
  done &
}

mount_folders() {
  mkdir -p "$me"/{cni,etcd,lib,log,opt}
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p /run/lock /run/tunables
  # Several programs have fixed places below these.
  mount --bind "$me/lib" /var/lib
  mount --bind "$me/log" /var/log
  # Volumes of the controller manager's making are here, on each node the same.
  mount --bind /mnt/tmp /tmp
}

has_moved() { grep -x 0::/programs /proc/self/cgroup && [ -n "$(</sys/fs/cgroup/cgroup.subtree_control)" ]; }

# Only the node's own groups may be seen, or programs look for limits in those of the machine.
mount_cgroups() {
  local controllers folder one
  umount -R /sys
  mount -t sysfs sysfs /sys
  if only_unified_cgroups; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # nodes.sh moves this process out of the way from outside; until then no group can be made for pods.
    until_done 100 has_moved
    return
  fi
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  while IFS=: read -r _ controllers _; do
    [ -n "$controllers" ] || continue
    folder="/sys/fs/cgroup/${controllers#name=}"
    mkdir "$folder"
    case "$controllers" in
      name=*) mount -t cgroup -o "none,$controllers" cgroup "$folder" ;;
      *) mount -t cgroup -o "$controllers" cgroup "$folder" ;;
    esac
    for one in ${controllers//,/ }; do [ -e "/sys/fs/cgroup/${one#name=}" ] || ln -s "$folder" "/sys/fs/cgroup/$one"; done
  done </proc/self/cgroup
}

# The kubelet insists on some settings that a kernel has only once. It finds them as it wants them, and the machine keeps its own.
feign_tunables() {
  local setting key file
  for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    key=${setting%=*} file="/run/tunables/${setting//\//.}"
    printf '%s\n' "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/$key"
  done
  echo 1 >/proc/sys/net/ipv4/ip_forward
  echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
}

start_containerd() {
  # Each pod has a cable to its node and no switch between: what goes from pod to pod passes the node's packet filter, which
  # makes services work, without the kernel module that a switch would want for it.
  cat >"$me/cni/pods.conflist" <<J
{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "ptp",
      "ipMasq": false,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni-addresses",
        "ranges": [[{"subnet": "$(node_pods "$number")"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
J
  cat >"$me/containerd.toml" <<T
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = "$me/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "floodmark.invalid/pause:1"
  # Root may lack the right to make a process less likely to be killed than itself.
  restrict_oom_score_adj = true
  disable_apparmor = true

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "$me/cni"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
T
  keep containerd containerd --config "$me/containerd.toml"
}

# until_done TENTHS COMMAND...
until_done() {
  local tenths=$1 i
  shift
  for ((i = 0; i < tenths; i++)); do
    ! "$@" >/dev/null 2>&1 || return 0
    sleep 0.1
  done
  echo "given up after $tenths tenths of a second: $*"
  return 1
}
import_pause() { ctr --namespace k8s.io images import /mnt/programs/images/pause.tar; }
api_answers() { (: <"/dev/tcp/$api/6443"); }

start_control_plane() {
  local etcd=http://127.0.0.1:2379 issuer=https://kubernetes.default.svc.cluster.local
  # Its data needs to outlive the node, not the machine.
  keep etcd etcd --data-dir "$me/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls "$etcd" --advertise-client-urls "$etcd" --listen-peer-urls http://127.0.0.1:2380
  # Pods leave a node that is lost after ten seconds, not the usual five minutes: tests wait for it.
  keep kube-apiserver kube-apiserver --etcd-servers "$etcd" --advertise-address "$address" --secure-port 6443 \
    --service-cluster-ip-range "$services" --allow-privileged --profiling=false \
    --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction \
    --default-not-ready-toleration-seconds 10 --default-unreachable-toleration-seconds 10 \
    --client-ca-file $pki/ca.crt --tls-cert-file $pki/apiserver.crt --tls-private-key-file $pki/apiserver.key \
    --kubelet-client-certificate $pki/apiserver-kubelet-client.crt --kubelet-client-key $pki/apiserver-kubelet-client.key \
    --kubelet-preferred-address-types InternalIP \
    --service-account-issuer "$issuer" --service-account-key-file $pki/sa.pub --service-account-signing-key-file $pki/sa.key \
    --requestheader-client-ca-file $pki/front-proxy-ca.crt --requestheader-allowed-names front-proxy-client \
    --requestheader-username-headers X-Remote-User --requestheader-group-headers X-Remote-Group \
    --requestheader-extra-headers-prefix X-Remote-Extra- \
    --proxy-client-cert-file $pki/front-proxy-client.crt --proxy-client-key-file $pki/front-proxy-client.key
  until_done 600 api_answers
  # At the pace that they keep by themselves, the controllers would take five seconds to start.
  keep kube-controller-manager kube-controller-manager --bind-address 127.0.0.1 --leader-elect=false --profiling=false \
    --kube-api-qps 200 --kube-api-burst 400 \
    --kubeconfig $pki/controller-manager.conf --authentication-kubeconfig $pki/controller-manager.conf \
    --authorization-kubeconfig $pki/controller-manager.conf --use-service-account-credentials \
    --client-ca-file $pki/ca.crt --requestheader-client-ca-file $pki/front-proxy-ca.crt --root-ca-file $pki/ca.crt \
    --cluster-signing-cert-file $pki/ca.crt --cluster-signing-key-file $pki/ca.key \
    --service-account-private-key-file $pki/sa.key \
    --allocate-node-cidrs=false --cluster-cidr "$pods" --enable-hostpath-provisioner \
    --flex-volume-plugin-dir /var/lib/kubelet/volume-plugins --node-monitor-grace-period 16s
  keep kube-scheduler kube-scheduler --bind-address 127.0.0.1 --leader-elect=false --profiling=false \
    --kubeconfig $pki/scheduler.conf --authentication-kubeconfig $pki/scheduler.conf \
    --authorization-kubeconfig $pki/scheduler.conf
  start_dns
  open_volumes &
}

start_dns() {
  # Nothing outside the cluster has a name here, and that is said at once.
  cat >"$me/Corefile" <<C
cluster.local:53 in-addr.arpa:53 {
  bind $address
  ready 127.0.0.1:8181
  errors
  loadbalance
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $pki/super-admin.conf
    ttl 2
  }
}
.:53 {
  bind $address
  errors
  template ANY ANY . {
    rcode NXDOMAIN
  }
}
C
  keep coredns coredns -conf "$me/Corefile"
}

# The controller manager makes volumes that only root may write to; who asks for one here is rarely root. Runs for ever, and
# starts no process to look.
open_volumes() {
  local volume never
  local -A seen=()
  shopt -s nullglob
  exec {never}<> <(:)
  while :; do
    for volume in /tmp/hostpath_pv/*; do
      [ -z "${seen[$volume]:-}" ] || continue
      chmod 777 "$volume" && seen[$volume]=1
    done
    read -r -t 0.2 -u "$never" || true
  done
}

start_agents() {
  cat >"$me/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $pki/ca.crt}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
# Of cgroups in the old hierarchies, which some machines still have, and swap, which is none of ours, it would complain.
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
clusterDomain: cluster.local
clusterDNS: ["$dns"]
resolvConf: ""
volumePluginDir: /var/lib/kubelet/volume-plugins
serializeImagePulls: false
# The disk is the machine's: its filling up is not for a node to act on, and images are brought once.
evictionHard: {memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%", imagefs.inodesFree: "0%"}
imageGCHighThresholdPercent: 100
# A node that is lost should be missed soon.
nodeLeaseDurationSeconds: 10
nodeStatusUpdateFrequency: 4s
Y
  keep kubelet kubelet --config "$me/kubelet.yaml" --kubeconfig "$me/kubelet.conf" \
    --hostname-override "node-$number" --node-ip "$address"
  # Settings of connection tracking are the machine's: 0 leaves them alone.
  keep kube-proxy kube-proxy --kubeconfig $pki/super-admin.conf --hostname-override "node-$number" --proxy-mode iptables \
    --cluster-cidr "$pods" --conntrack-max-per-core 0 --conntrack-tcp-timeout-established 0 \
    --conntrack-tcp-timeout-close-wait 0 --metrics-bind-address 127.0.0.1:10249
}

mount_folders
mount_cgroups
feign_tunables
mount --make-rshared /
hostname "node-$number"
start_containerd
{ until_done 200 ctr version && import_pause; } >>"/mnt/log/images-$number.log" 2>&1 &
importing=$!
[ "$number" != 0 ] || start_control_plane
until_done 600 api_answers
wait "$importing"
start_agents

# What loses its parent in here becomes a child of this process: bury it, for ever.
while :; do wait -n || sleep 1; done
