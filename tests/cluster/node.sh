#!/usr/bin/env bash
# One node of a cluster, and what can befall it:
#   node.sh [--name NAME] list
#   node.sh [--name NAME] stop|start N      a power cut; on again, with the disk as it was
#   node.sh [--name NAME] cut|heal N        the cable out; back again
#   node.sh [--name NAME] enter N COMMAND...
# N may be said as kubectl says it, too: node-N.
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"
# shellcheck source=tests/cluster/nodes.sh
. "$here/nodes.sh"

become_root "$@"
take_name "$@"
shift "$shifted"
recall || fail "no cluster '$name' is up: make cluster"
order=${1:-list} node=${2:-}
node=${node#node-}
[ "$order" = list ] || must_be_node "$node"

# up.sh and down.sh start and end nodes, too.
alone() { exec 9>"$lock"; flock 9; }

case "$order" in
  list)
    for ((i = 0; i < nodes; i++)); do
      if ! runs "$i"; then how=stopped
      elif ip -n "$link" link show "n$i" | grep 'state DOWN' >/dev/null; then how='cut'
      else how=running
      fi
      printf 'node-%s %s %s\n' "$i" "$(node_address "$i")" "$how"
    done
    ;;
  stop) alone; stop_node "$node" ;;
  start) alone; runs "$node" || start_node "$node" ;;
  cut) ip -n "$link" link set "n$node" down ;;
  heal) ip -n "$link" link set "n$node" up ;;
  enter) shift 2; within "$node" "${@:-bash}" ;;
  *) fail "usage: node.sh [--name NAME] list | stop N | start N | cut N | heal N | enter N COMMAND..." ;;
esac
