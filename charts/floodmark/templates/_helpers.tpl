{{/* What the names of the chart's objects begin with: at most 40 characters, so that suffixes fit. */}}
{{- define "floodmark.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The controller's Deployment, its Service, and its Lease. */}}
{{- define "floodmark.controller" -}}
{{- printf "%s-controller" (include "floodmark.fullname" .) -}}
{{- end -}}

{{/* The Service of the webhook, and the Secret with its certificates. */}}
{{- define "floodmark.webhook" -}}
{{- printf "%s-webhook" (include "floodmark.fullname" .) -}}
{{- end -}}

{{/* Cluster-scoped objects: two releases of one name in different namespaces must not share them. */}}
{{- define "floodmark.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "floodmark.controller" .) -}}
{{- end -}}

{{/* The webhook's configuration: no colon may stand in its name. */}}
{{- define "floodmark.webhookConfiguration" -}}
{{- printf "%s.%s" (include "floodmark.webhook" .) .Release.Namespace -}}
{{- end -}}

{{- define "floodmark.serviceAccount" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "floodmark.controller" . -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{- define "floodmark.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* By these the controller's pods are found. Network policies of jobs name the first one (controller/src/objects). */}}
{{- define "floodmark.selector" -}}
app.kubernetes.io/name: floodmark-controller
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "floodmark.labels" -}}
{{ include "floodmark.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: floodmark
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The namespaces that are watched, as a YAML list; empty: all. */}}
{{- define "floodmark.namespaces" -}}
{{- if .Values.clusterWide -}}
{{- if .Values.watchNamespaces -}}
{{- fail "watchNamespaces and clusterWide exclude each other: leave one of them out" -}}
{{- end -}}
{{- list | toYaml -}}
{{- else -}}
{{- default (list .Release.Namespace) .Values.watchNamespaces | toYaml -}}
{{- end -}}
{{- end -}}

{{/* Of a container that can do nothing but compute and talk. */}}
{{- define "floodmark.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "floodmark.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}
