#!/usr/bin/env bash
# Ends a cluster and removes all that is left of it, also of one that came up only in part:
#   down.sh [--name NAME]
# (--locked is up.sh's: it has the cluster to itself already.)
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"
# shellcheck source=tests/cluster/nodes.sh
. "$here/nodes.sh"

become_root "$@"
take_name "$@"
shift "$shifted"
case "${1:-}" in
  --locked) ;;
  '')
    # What a cluster said that did not come up.
    rm -rf "$clusters/$name.failed"
    [ -e "$state" ] || { say "no cluster '$name' is up"; exit; }
    exec 9>"$lock"
    flock 9
    ;;
  *) fail "usage: down.sh [--name NAME]" ;;
esac
[ -e "$state" ] || exit 0

if recall; then
  for ((i = 0; i < nodes; i++)); do [ ! -e "$state/cgroups" ] || stop_node "$i"; done
  [ ! -e "/run/netns/$link" ] || ip netns delete "$link"
  ip link delete "$link" 2>/dev/null || true
  if [ -e "$state/controllers" ]; then
    # Those that were not allowed before; they stay if somebody else uses them now.
    read -r root <"$state/cgroups"
    for controller in $(<"$root/cgroup.subtree_control"); do
      grep -w "$controller" "$state/controllers" >/dev/null || echo "-$controller" >"$root/cgroup.subtree_control" 2>/dev/null || true
    done
  fi
fi
rm -rf --one-file-system "$state"
[ "${1:-}" = --locked ] || { rmdir --ignore-fail-on-non-empty "$clusters"; say "cluster '$name' is gone"; }
