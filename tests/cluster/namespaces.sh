#!/usr/bin/env bash
# A cluster of namespaces on this machine, by the orders that kind.sh has, too:
#   namespaces.sh up [--name NAME] [--nodes N] | down | load TAR... | node ...      (see up.sh, down.sh, load.sh, node.sh)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

order=${1:-}
shift || true
case "$order" in
  up)
    "$here/../../scripts/setup-cluster.sh"
    exec "$here/up.sh" "$@"
    ;;
  down | load | node) exec "$here/$order.sh" "$@" ;;
  *)
    echo "usage: namespaces.sh up [--nodes N] | down | load TAR... | node ORDER..., each with [--name NAME] first" >&2
    exit 1
    ;;
esac
