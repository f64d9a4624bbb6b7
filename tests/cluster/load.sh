#!/usr/bin/env bash
# Brings images into every node of a cluster, where pods then find them by their names (imagePullPolicy: IfNotPresent or Never):
#   load.sh [--name NAME] TAR...
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"

become_root "$@"
take_name "$@"
shift "$shifted"
[ $# -gt 0 ] || fail "usage: load.sh [--name NAME] TAR..."
must_be_up
for image in "$@"; do [ -r "$image" ] || fail "there is no image at $image"; done

load_into() {
  local image
  for image in "${@:2}"; do within "$1" ctr --namespace k8s.io images import - <"$image" >/dev/null || return 1; done
}
loads=()
for ((i = 0; i < nodes; i++)); do
  # One that was stopped misses them.
  if ! runs "$i"; then
    say "node $i is stopped: it gets nothing"
    continue
  fi
  load_into "$i" "$@" &
  loads+=("$!")
done
for load in ${loads[@]+"${loads[@]}"}; do wait "$load" || fail "an image could not be brought into a node: see above"; done
