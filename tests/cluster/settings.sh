# shellcheck shell=bash disable=SC2034 # what is set here is used by those who source it
# Shared by the scripts of this folder: which cluster is meant, where it is, and what its parts are called. Sourced, never run.
#
# A cluster has a name, which people use, and a subnet 10.X.0.0/16 that was free when it came up. Its links and namespaces are
# called by X (names of links may not be long), all else by its name. On that subnet:
#   10.X.N.0/24        pods of node N
#   10.X.128.0/18      services; the DNS is 10.X.128.10
#   10.X.192.0/24      the machines: .1 is this machine, .10 + N is node N

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(cd "$here/../.." && pwd)"
# shellcheck source=scripts/lib.sh
. "$repository/scripts/lib.sh"

NAME_CHARACTERS_MAX=24
NODES_MAX=16

# All clusters of this machine, one folder each.
clusters="${FLOODMARK_CLUSTERS:-/var/lib/floodmark-clusters}"
name="${FLOODMARK_CLUSTER:-dev}"
locks=/run/lock

# Nodes are namespaces, so everything here is root's work.
become_root() {
  [ "$(id -u)" != 0 ] || return 0
  have sudo || fail "a cluster needs root: run this as root, or install sudo"
  exec sudo env "FLOODMARK_CACHE=$FLOODMARK_CACHE" "FLOODMARK_CLUSTERS=$clusters" "FLOODMARK_CLUSTER=$name" "$0" "$@"
}

# Takes the option that all scripts share off the front of "$@", if it is there; $shifted says how many words that were.
take_name() {
  shifted=0
  if [ "${1:-}" = --name ]; then
    name="${2:?--name wants the name of a cluster}"
    shifted=2
  fi
  locate
}

locate() {
  [[ $name =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ && ${#name} -le $NAME_CHARACTERS_MAX ]] ||
    fail "a cluster's name has up to $NAME_CHARACTERS_MAX small letters, digits and dashes, unlike '$name'"
  state="$clusters/$name"
  lock="$locks/floodmark-cluster-$name.lock"
}

# What of the cluster is known once it has a subnet: from here on $x, and all that is called by it.
recall() {
  [ -e "$state/subnet" ] || return 1
  x=$(<"$state/subnet")
  nodes=$(<"$state/nodes")
  link="fmk$x" host="10.$x.192.1" services="10.$x.128.0/18" dns="10.$x.128.10" pods="10.$x.0.0/17"
}

is_up() { recall && [ -e "$state/ready" ] && runs 0; }
must_be_up() { is_up || fail "no cluster '$name' is up: make cluster"; }
must_be_node() { [[ $1 =~ ^[0-9]+$ && $1 -lt $nodes ]] || fail "the nodes of '$name' are 0 to $((nodes - 1)), not '$1'"; }

node_address() { printf '10.%s.192.%s' "$x" $((10 + $1)); }
node_pods() { printf '10.%s.%s.0/24' "$x" "$1"; }
node_network() { printf 'fmk%s-%s' "$x" "$1"; }

only_unified_cgroups() { [ "$(grep -c : /proc/self/cgroup)" = 1 ]; }

# The moment at which a process started, in the kernel's ticks: with it a number that was given anew is not mistaken for our own.
started_at() { [ ! -r "/proc/$1/stat" ] || sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }

# The process that holds a node's namespaces together, if it is still that one; its child is the node's first process.
holder() {
  local pid started
  [ -e "$state/node-$1.pid" ] || return 1
  read -r pid started <"$state/node-$1.pid"
  [ -n "$started" ] && [ "$(started_at "$pid")" = "$started" ] && printf '%s' "$pid"
}
runs() { holder "$1" >/dev/null; }

# Runs a command in a node, in all of its namespaces: within NODE COMMAND...
within() {
  local pid first
  pid=$(holder "$1") || fail "node $1 of '$name' is not running: tests/cluster/node.sh start $1"
  first=$(<"/proc/$pid/task/$pid/children")
  [ -n "$first" ] || fail "node $1 of '$name' has only begun to start"
  shift
  nsenter --target "${first% }" --mount --net --pid --uts --ipc --cgroup "$@"
}
