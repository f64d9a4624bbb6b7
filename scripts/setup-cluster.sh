#!/usr/bin/env bash
# What the tests' Kubernetes cluster consists of: containerd and its like from Debian, Kubernetes, etcd, CoreDNS and helm through
# Go modules (tests/cluster/programs), built into the cache once for each version of them.
#   setup-cluster.sh            sees to all of it
#   setup-cluster.sh --where    says where the programs are or will be
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

GO_WANTED=1.24
# Goes up when the recipe below changes.
RECIPE=1

programs=tests/cluster/programs
# The version of a module, without the v.
module() { sed -n "s|^\s*$1 v\([^ ]*\).*|\1|p" "$programs/go.mod" | head -n 1; }
kubernetes=$(module k8s.io/kubernetes) helm=$(module helm.sh/helm/v3)
sources=$({ find "$programs" -type f | sort; echo tests/cluster/image/archive.py; } | xargs sha256sum | sha256sum | cut -c 1-8)
home="$FLOODMARK_CACHE/cluster-$kubernetes-$sources-$RECIPE"
[ "${1:-}" != --where ] || { printf '%s\n' "$home"; exit; }

# A program may come from elsewhere: Docker brings a containerd of its own, which Debian's would replace.
absent=()
need() { have "$1" || [ -e "$1" ] || absent+=("$2"); }
need containerd containerd
need runc runc
need /usr/lib/cni/ptp containernetworking-plugins
need iptables iptables
need ip iproute2
need nsenter util-linux
need findmnt util-linux
need python3 python3
[ ${#absent[@]} = 0 ] || packages "${absent[@]}"
[ -e /usr/lib/cni/ptp ] || fail "the CNI plugins are not in /usr/lib/cni: install them there, then try again"

[ ! -e "$home/bin/kube" ] || exit 0

go_toolchain "$GO_WANTED" "the cluster's programs"

# Two builds at once must not meet; a build that was killed leaves a folder that the next one removes.
mkdir -p "$FLOODMARK_CACHE"
exec 9>"$FLOODMARK_CACHE/cluster.lock"
have flock && flock 9
[ ! -e "$home/bin/kube" ] || exit 0
work="$home.new"
rm -rf "$work"
mkdir -p "$work/bin" "$work/images"

# build PACKAGE PROGRAM [LINKER FLAGS]
build() {
  say "  ${2##*/}"
  (cd "$programs" && CGO_ENABLED=0 GOFLAGS="${GOFLAGS:-} -mod=readonly" \
    go build -buildvcs=false -trimpath -tags grpcnotrace -ldflags "-s -w ${3:-}" -o "$2" "$1") ||
    fail "Go could not build ${2##*/}: see above"
}
started=$SECONDS
say "building Kubernetes $kubernetes, etcd, CoreDNS and helm $helm for the tests' cluster (once, about ten minutes)"
version=k8s.io/component-base/version
IFS=. read -r major minor _ <<<"$kubernetes"
build ./kube "$work/bin/kube" "-X $version.gitVersion=v$kubernetes -X $version.gitMajor=$major -X $version.gitMinor=$minor"
for name in coredns etcd kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubeadm kubectl kubelet; do
  ln -s kube "$work/bin/$name"
done
build helm.sh/helm/v3/cmd/helm "$work/bin/helm" "-X helm.sh/helm/v3/internal/version.version=v$helm"

# The images that need no Floodmark: one that each pod has, and the one with which a cluster is tried.
for name in pause probe; do
  build "./$name" "$work/$name/$name"
  python3 tests/cluster/image/archive.py "$work/images/$name.tar" "floodmark.invalid/$name:1" --entrypoint "/$name" \
    --user 65532:65532 "$work/$name"
done
mv "$work/probe/probe" "$work/bin/"
rm -rf "$work/pause" "$work/probe" "$home"
mv "$work" "$home"
say "built in $((SECONDS - started)) s: $home"
