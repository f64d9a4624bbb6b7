# shellcheck shell=bash disable=SC2154 # what is not set here is settings.sh's
# Starts and ends nodes. Sourced by up.sh, down.sh and node.sh, after settings.sh.
#
# A node is a process tree in namespaces of its own. What it writes is in its folder, so that a node that was ended and started
# again is the same machine after a power cut. Nothing outside its namespaces, its folder and its cgroups is changed by it.

ENDING_TENTHS_MAX=100
SETTLING_TENTHS_MAX=100

# Where the nodes' cgroups hang: in the old hierarchies below this process's own group, so that its limits hold for them, too.
# In the unified one a group with processes can't have groups with limits below it, so there it is the root.
cgroup_parents() {
  local controllers path mount
  if only_unified_cgroups; then
    findmnt --noheadings --first-only --types cgroup2 --output TARGET
    return
  fi
  while IFS=: read -r _ controllers path; do
    # Where both kinds are mounted, the unified one limits nothing.
    [ -n "$controllers" ] || continue
    mount=$(findmnt --noheadings --first-only --types cgroup --options "$controllers" --output TARGET) || continue
    [ -d "$mount$path" ] || path=
    printf '%s\n' "$mount${path%/}"
  done </proc/self/cgroup
}

# Makes a node's cgroups, and moves this process into them.
enter_cgroups() {
  local parent group file
  while read -r parent; do
    group="$parent/$(node_network "$1")"
    mkdir -p "$group"
    if ! only_unified_cgroups; then
      # A new group of this kind has no processor and no memory until told.
      for file in cpuset.cpus cpuset.mems; do
        [ ! -e "$group/$file" ] || cat "$parent/$file" >"$group/$file"
      done
      [ ! -e "$group/memory.use_hierarchy" ] || echo 1 >"$group/memory.use_hierarchy" 2>/dev/null || true
    fi
    printf '%s\n' "$BASHPID" >"$group/cgroup.procs"
  done <"$state/cgroups"
}

# In the unified hierarchy a group that limits others may have no processes itself: once the node's process PID has made the group
# the root of what it sees, it and its first child go one group down. settle_cgroups NODE PID
settle_cgroups() {
  local parent group one i
  read -r parent <"$state/cgroups"
  group="$parent/$(node_network "$1")"
  for ((i = 0; i < SETTLING_TENTHS_MAX; i++)); do
    if [ "$(readlink "/proc/$2/ns/cgroup")" != "$(readlink /proc/self/ns/cgroup)" ]; then
      mkdir -p "$group/programs"
      while read -r one; do echo "$one" >"$group/programs/cgroup.procs" || true; done <"$group/cgroup.procs"
      ! allow_controllers "$group" || return 0
    fi
    sleep 0.1
  done 2>/dev/null
  fail "the cgroups of node $1 can't have limits: is this a container? Run this on the machine itself"
}

# Lets the groups below one have the limits that a kubelet sets.
allow_controllers() {
  local controller
  for controller in $(<"$1/cgroup.controllers"); do
    case "$controller" in
      cpu | cpuset | hugetlb | io | memory | pids)
        grep -w "$controller" "$1/cgroup.subtree_control" >/dev/null || echo "+$controller" >"$1/cgroup.subtree_control" || return 1
        ;;
    esac
  done
}

leave_no_cgroups() {
  local parent group
  while read -r parent; do
    group="$parent/$(node_network "$1")"
    [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} + || return 1
  done <"$state/cgroups"
}

# Lays a node's cable, and the routes of node N to everybody and of this machine to its pods.
lay_cable() {
  local i network gateway
  network=$(node_network "$1")
  ip netns add "$network"
  # A node that comes back has the hardware address that everybody remembers.
  ip link add eth0 netns "$network" address "$(printf '02:fd:00:00:%02x:%02x' "$x" "$1")" type veth peer name "n$1" netns "$link"
  ip -n "$link" link set "n$1" master switch up
  ip -n "$network" address add "$(node_address "$1")/24" dev eth0
  ip -n "$network" link set lo up
  ip -n "$network" link set eth0 up
  ip -n "$network" route add default via "$host"
  for ((i = 0; i < nodes; i++)); do
    [ "$i" = "$1" ] || ip -n "$network" route add "$(node_pods "$i")" via "$(node_address "$i")"
  done
  gateway=$(node_address "$1")
  ip route replace "$(node_pods "$1")" via "$gateway"
  [ "$1" != 0 ] || ip route replace "$services" via "$gateway"
}

start_node() {
  local pid
  lay_cable "$1"
  (
    # Locks are up.sh's, and must not outlive it.
    exec 8>&- 9>&-
    enter_cgroups "$1"
    exec setsid nsenter --net="/run/netns/$(node_network "$1")" \
      unshare --mount --pid --uts --ipc --cgroup --fork --kill-child=KILL --mount-proc \
      "$here/node-init.sh" "$name" "$1" </dev/null >>"$state/log/node-$1.log" 2>&1
  ) &
  pid=$!
  disown "$pid"
  printf '%s %s\n' "$pid" "$(started_at "$pid")" >"$state/node-$1.pid"
  ! only_unified_cgroups || settle_cgroups "$1" "$pid"
}

# Ends a node as a power cut does: at once, with all that runs in it.
stop_node() {
  local pid i parent
  if pid=$(holder "$1"); then
    kill -KILL "$pid" 2>/dev/null || true
  fi
  rm -f "$state/node-$1.pid"
  # The kernel ends the rest when the first process of the node is gone; cgroups can be removed once nobody is in them.
  for ((i = 0; i < ENDING_TENTHS_MAX; i++)); do
    leave_no_cgroups "$1" 2>/dev/null && break
    sleep 0.1
  done
  leave_no_cgroups "$1" || fail "processes of node $1 of '$name' do not end: see the groups $(node_network "$1") of $state/cgroups"
  network=$(node_network "$1")
  [ ! -e "/run/netns/$network" ] || ip netns delete "$network"
  ip -n "$link" link delete "n$1" 2>/dev/null || true
}
