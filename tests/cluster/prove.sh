#!/usr/bin/env bash
# Shows that the cluster is one, by all that an operator's tests will want of it:
#   prove.sh [--name NAME]
# It needs three nodes, and takes them apart; nothing stays behind when it passes. Stops at the first thing that is not so.
set -euo pipefail
# shellcheck source=tests/cluster/settings.sh
. "$(dirname "$0")/settings.sh"

become_root "$@"
take_name "$@"
must_be_up
[ "$nodes" -ge 3 ] || fail "cluster '$name' has $nodes nodes, and this wants 3: end it, then up.sh --nodes 3"
KUBECONFIG="$state/kubeconfig"
installed=$(<"$state/installed")
export KUBECONFIG PATH="$installed/bin:$PATH"

PATIENCE_SECONDS=90
space="prove-$$"
scratch=$(mktemp -d)
children=()
clean_up() {
  local code=$? node
  trap - EXIT
  [ ${#children[@]} = 0 ] || kill "${children[@]}" 2>/dev/null || true
  if [ "$code" != 0 ]; then
    kubectl --namespace "$space" get pods -o wide >&2 || true
    kubectl --namespace "$space" get events --sort-by=.lastTimestamp 2>&1 | tail -n 15 >&2
  fi
  for node in 1 2; do
    "$here/node.sh" --name "$name" heal "$node" 2>/dev/null || true
    "$here/node.sh" --name "$name" start "$node" || true
    kubectl uncordon "node-$node" >/dev/null || true
  done
  kubectl delete validatingwebhookconfiguration "$space" --ignore-not-found >/dev/null || true
  kubectl delete crd gauges.prove.floodmark.invalid --ignore-not-found >/dev/null || true
  kubectl delete namespace "$space" --ignore-not-found --timeout="${PATIENCE_SECONDS}s" >/dev/null || code=1
  rm -rf "$scratch"
  exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

begun=$EPOCHREALTIME
step() {
  printf '%6.1f s  %s\n' "$(awk -v a="$begun" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }')" "$1"
}
k() { kubectl --namespace "$space" "$@"; }
# same WHAT GOT WANTED
same() { [ "$2" = "$3" ] || fail "$1: got '$2', not '$3'"; }
# refused WORDS COMMAND...: the command must fail, and say WORDS.
refused() {
  local words=$1 said
  shift
  if said=$("$@" 2>&1); then fail "not refused: $*"; fi
  grep -q -- "$words" <<<"$said" || fail "refused, but not for '$words': $said"
}
# soon WHAT COMMAND...: tries until it succeeds.
soon() {
  local what=$1 until=$((SECONDS + PATIENCE_SECONDS))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$until" ] || fail "not so after $PATIENCE_SECONDS s: $what"
    sleep 0.3
  done
}
field() { k get "$1" -o "jsonpath={$2}"; }
in_pod() { k exec "$1" -- /probe "${@:2}"; }

"$here/load.sh" --name "$name" "$installed/images/probe.tar"
kubectl create namespace "$space" >/dev/null
kubectl label namespace "$space" pod-security.kubernetes.io/enforce=restricted >/dev/null
soon "a service account in a new namespace" k get serviceaccount default

step "a StatefulSet with volumes in a namespace that admits restricted pods alone"
(cd "$scratch" && "$installed/bin/probe" certificate "hook.$space.svc")
k create secret tls hook --cert "$scratch/tls.crt" --key "$scratch/tls.key" >/dev/null
k apply -f "$here/prove.yaml" >/dev/null
k rollout status statefulset/peer --timeout="${PATIENCE_SECONDS}s" >/dev/null
refused 'violates PodSecurity' k run bad --image=floodmark.invalid/probe:1 --overrides='{"spec":{"hostNetwork":true}}'

step "names: of a pod, of a service, of nothing"
address=$(field pod/peer-1 .status.podIP)
same "address of peer-1" "$(in_pod peer-0 lookup "peer-1.peer.$space.svc.cluster.local")" "$address"
same "addresses of peer" "$(in_pod peer-0 lookup peer | sort | xargs)" "$({ field pod/peer-0 .status.podIP; echo; echo "$address"; } | sort | xargs)"
refused 'no such host' in_pod peer-0 lookup nobody.example

step "pods, services and this machine reach each other"
service=$(field service/peer-any .spec.clusterIP)
same "pod to pod" "$(in_pod peer-0 get http://peer-1.peer:8080)" peer-1
same "pod to itself through a service" "$(for ((i = 0; i < 16; i++)); do in_pod peer-0 get http://peer-any; done | sort -u | xargs)" "peer-0 peer-1"
same "machine to pod" "$("$installed/bin/probe" get "http://$address:8080")" peer-1
[[ $("$installed/bin/probe" get "http://$service") == peer-[01] ]] || fail "this machine does not reach service $service"
"$installed/bin/probe" serve "$host:0" 2>"$scratch/server" &
children+=("$!")
soon "a server on this machine" grep -q listening "$scratch/server"
same "pod to machine" "$(in_pod peer-1 get "http://$(sed -n 's/.*listening on //p' "$scratch/server")")" "$(uname -n)"

step "logs, exec with its exit code, port-forward"
grep -q 'starts: 1' <<<"$(k logs peer-1)" || fail "peer-1's log does not say how often it has started"
refused 'exit code 1' in_pod peer-0 get http://peer-1.peer:1
kubectl --namespace "$space" port-forward pod/peer-1 :8080 >"$scratch/forward" &
children+=("$!")
soon "a forwarded port" grep -q Forwarding "$scratch/forward"
same "through the forwarded port" "$("$installed/bin/probe" get "http://127.0.0.1:$(sed -n 's/.*127.0.0.1:\([0-9]*\) .*/\1/p' "$scratch/forward")")" peer-1
kill "$!"

step "a container that is killed is started again, a pod that is deleted comes back: both with the volume"
container=$(field pod/peer-1 '.status.containerStatuses[0].containerID')
node=$(field pod/peer-1 .spec.nodeName)
"$here/node.sh" --name "$name" enter "${node#node-}" ctr --namespace k8s.io task kill --signal SIGKILL "${container#containerd://}"
restarted() { [ "$(field pod/peer-1 '.status.containerStatuses[0].restartCount')" = 1 ]; }
soon "peer-1 is started again" restarted
grep -q 'starts: 2' <<<"$(k logs peer-1)" || fail "peer-1 has not found its volume again"
before=$(field pod/peer-0 .metadata.uid)
k delete pod peer-0 >/dev/null
k rollout status statefulset/peer --timeout="${PATIENCE_SECONDS}s" >/dev/null
[ "$(field pod/peer-0 .metadata.uid)" != "$before" ] || fail "peer-0 is the pod that was deleted"
grep -q 'starts: 2' <<<"$(k logs peer-0)" || fail "peer-0 has not found its volume again"

step "rights: an account may do what its role says, and nothing else"
account="system:serviceaccount:$space:reader"
same "the reader may list pods" "$(k auth can-i list pods --as "$account")" yes
refused '^no' k auth can-i list secrets --as "$account"
token=$(k create token reader)
server=$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')
kubectl config view --minify --raw -o 'jsonpath={.clusters[0].cluster.certificate-authority-data}' | base64 -d >"$scratch/ca.crt"
as_reader() { kubectl --kubeconfig /dev/null --server "$server" --certificate-authority "$scratch/ca.crt" --token "$token" -n "$space" "$@"; }
as_reader get pods -o name | grep pod/peer-0 >/dev/null || fail "the reader's token does not let it list pods"
refused 'forbidden' as_reader get secrets
soon "a Lease" k get lease held

step "an admission webhook, called through its service"
k rollout status deployment/hook --timeout="${PATIENCE_SECONDS}s" >/dev/null
kubectl create -f - >/dev/null <<Y
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: $space}
webhooks:
  - name: hook.prove.floodmark.invalid
    admissionReviewVersions: [v1]
    sideEffects: None
    failurePolicy: Fail
    timeoutSeconds: 5
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: $space}}
    rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
    clientConfig:
      service: {namespace: $space, name: hook, port: 443}
      caBundle: $(base64 -w 0 "$scratch/tls.crt")
Y
config_map() { printf 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, labels: {admit: "%s"}}\n' "$1" "$2" | k create -f -; }
is_refused() { ! config_map "tried-$RANDOM$RANDOM" no; }
soon "the webhook is asked" is_refused
refused 'admits nothing labelled admit=no' config_map bad no
config_map good yes >/dev/null

step "a resource with rules in CEL and a status of its own"
kubectl apply -f "$here/prove-crd.yaml" >/dev/null
kubectl wait --for=condition=Established crd/gauges.prove.floodmark.invalid --timeout="${PATIENCE_SECONDS}s" >/dev/null
gauge() { printf 'apiVersion: prove.floodmark.invalid/v1\nkind: Gauge\nmetadata: {name: gauge}\nspec: {low: %s, high: %s}\n' "$1" "$2" | k apply -f -; }
gauge 1 2 >/dev/null
refused 'low must be below high' gauge 3 2
k patch gauge gauge --subresource=status --type=merge --patch '{"status":{"reading":2}}' >/dev/null
same "status of the gauge" "$(field gauge/gauge .status.reading)" 2

step "helm installs and uninstalls"
mkdir -p "$scratch/chart/templates"
printf 'apiVersion: v2\nname: tried\nversion: 0.1.0\n' >"$scratch/chart/Chart.yaml"
printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: {{ .Release.Name }}}\n' >"$scratch/chart/templates/secret.yaml"
helm --namespace "$space" install tried "$scratch/chart" >/dev/null
k get secret tried >/dev/null
helm --namespace "$space" uninstall tried >/dev/null
refused 'not found' k get secret tried

step "a drain waits for as long as a budget forbids it"
node=$(field pod/peer-1 .spec.nodeName)
[ "$node" != node-0 ] || fail "peer-1 is on node-0, where the control plane is: nothing may be drained there"
drain() { kubectl drain "$node" --ignore-daemonsets --delete-emptydir-data --timeout="$1" --pod-selector app=peer; }
k create poddisruptionbudget peer --selector=app=peer --min-available=2 >/dev/null
budget_is_known() { [ "$(field pdb/peer .status.currentHealthy)" = 2 ]; }
soon "the budget counts its pods" budget_is_known
refused "disruption budget" drain 3s
k patch pdb peer --type=merge --patch '{"spec":{"minAvailable":1}}' >/dev/null
drain "${PATIENCE_SECONDS}s" >/dev/null 2>&1
moved() { [ "$(field pod/peer-1 .spec.nodeName)" != "$node" ] && k rollout status statefulset/peer --timeout=1s; }
soon "peer-1 is on another node" moved
kubectl uncordon "$node" >/dev/null

step "a node that loses its power is missed, its pods are replaced, and it comes back"
node=$(k get pods --selector app=hook -o 'jsonpath={.items[0].spec.nodeName}')
[ "$node" != node-0 ] || fail "the hook is on node-0, where the control plane is: that node can't be stopped"
lost=$(k get pods --selector app=hook -o 'jsonpath={.items[0].metadata.name}')
at=$SECONDS
"$here/node.sh" --name "$name" stop "${node#node-}"
kubectl wait --for=condition=Ready=Unknown "node/$node" --timeout="${PATIENCE_SECONDS}s" >/dev/null
step "  missed after $((SECONDS - at)) s"
replaced() {
  k get pods --selector app=hook -o 'jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}' |
    grep -v "^$lost " | grep ' True$' >/dev/null
}
soon "another hook is ready" replaced
step "  replaced after $((SECONDS - at)) s"
"$here/node.sh" --name "$name" start "${node#node-}"
at=$SECONDS
kubectl wait --for=condition=Ready "node/$node" --timeout="${PATIENCE_SECONDS}s" >/dev/null
step "  ready $((SECONDS - at)) s after it was started again"
gone() { ! k get pod "$lost"; }
soon "the lost hook is gone" gone
k rollout status statefulset/peer --timeout="${PATIENCE_SECONDS}s" >/dev/null

step "a node whose cable is out is missed, keeps its pods running, and is back when it is healed"
node=$(field pod/peer-1 .spec.nodeName)
if [ "$node" = node-0 ]; then node=$(field pod/peer-0 .spec.nodeName); fi
[ "$node" != node-0 ] || fail "both peers are on node-0"
"$here/node.sh" --name "$name" cut "${node#node-}"
kubectl wait --for=condition=Ready=Unknown "node/$node" --timeout="${PATIENCE_SECONDS}s" >/dev/null
"$here/node.sh" --name "$name" enter "${node#node-}" ctr --namespace k8s.io task list | grep RUNNING >/dev/null || fail "$node has ended its pods"
"$here/node.sh" --name "$name" heal "${node#node-}"
kubectl wait --for=condition=Ready "node/$node" --timeout="${PATIENCE_SECONDS}s" >/dev/null
soon "the peers are ready" k rollout status statefulset/peer --timeout=1s

step "all volumes go with their namespace"
kubectl delete validatingwebhookconfiguration "$space" >/dev/null
kubectl delete namespace "$space" --timeout="${PATIENCE_SECONDS}s" >/dev/null
no_volumes() { [ -z "$(kubectl get pv -o name)" ] && [ -z "$(ls "$state/tmp/hostpath_pv")" ]; }
soon "no volume is left" no_volumes
step "passed"
