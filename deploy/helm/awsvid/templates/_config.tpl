{{/* Returns the configuration as YAML: what the chart sets, and `config` over it. */}}
{{- define "awsvid.config" -}}
{{- $listen := dict
  "tcp" list
  "unix" ""
  "admin" "[::]:975"
  "status" "/run/awsvid/status.sock"
  "token_file" "/run/awsvid/token" -}}
{{- if .Values.host.enabled -}}
{{- $_ := set $listen "tcp" (list "127.0.0.1:974" "[::1]:974") -}}
{{- $_ := set $listen "unix" "/run/awsvid-socket/awsvid.sock" -}}
{{- end -}}
{{- $pods := dict "enabled" true "handover_socket" "/run/awsvid-handover/own/awsvid.sock" -}}
{{- with .Values.pods.cgroupRoot -}}
{{- $_ := set $pods "cgroup_root" . -}}
{{- end -}}
{{- $spire := .Values.spire -}}
{{- $identity := dict "source" .Values.source "workload_api_socket" (printf "unix://%s" $spire.socket) -}}
{{- if eq .Values.source "spiffe-broker" -}}
{{- $_ := set $identity "broker_socket" (printf "unix://%s" $spire.brokerSocket) -}}
{{- else if eq .Values.source "spire-delegated" -}}
{{- $_ := set $identity "admin_socket" (printf "unix://%s" $spire.adminSocket) -}}
{{- end -}}
{{- $config := dict "listen" $listen "pods" $pods "identity" $identity -}}
{{- if ne .Values.imds.mode "off" -}}
{{- /* On the node, so that the next pod accepts the tokens of this one. */ -}}
{{- $imds := dict "mode" .Values.imds.mode "region" .Values.imds.region "key_file" "/run/awsvid-handover/own/imds-key" -}}
{{- $_ := set $config "imds" $imds -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $config (deepCopy .Values.config)) -}}
{{- end -}}

{{/* Returns awsvid.toml. */}}
{{- define "awsvid.toml" -}}
{{- include "awsvid.toml.table" (dict "path" "" "table" (include "awsvid.config" . | fromYaml)) | trim -}}
{{- end -}}

{{/*
Returns a table in TOML: its values, then its tables, then its arrays of tables. A null removes a
key. Helm's own toToml writes whole numbers as floats, which awsvid rejects.
*/}}
{{- define "awsvid.toml.table" -}}
{{- $path := .path -}}
{{- range $key, $value := .table -}}
{{- if not (or (kindIs "invalid" $value) (kindIs "map" $value) (eq "true" (include "awsvid.toml.isTables" $value))) }}
{{ include "awsvid.toml.key" $key }} = {{ include "awsvid.toml.value" $value }}
{{- end -}}
{{- end -}}
{{- range $key, $value := .table -}}
{{- $name := printf "%s%s" $path (include "awsvid.toml.key" $key) -}}
{{- if kindIs "map" $value }}

[{{ $name }}]
{{- include "awsvid.toml.table" (dict "path" (printf "%s." $name) "table" $value) -}}
{{- end -}}
{{- end -}}
{{- range $key, $value := .table -}}
{{- $name := printf "%s%s" $path (include "awsvid.toml.key" $key) -}}
{{- if eq "true" (include "awsvid.toml.isTables" $value) -}}
{{- range $item := $value }}

[[{{ $name }}]]
{{- include "awsvid.toml.table" (dict "path" (printf "%s." $name) "table" $item) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Returns "true" for a list that is not empty and whose first item is a map. */}}
{{- define "awsvid.toml.isTables" -}}
{{- if kindIs "slice" . -}}
{{- if gt (len .) 0 -}}
{{- kindIs "map" (first .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "awsvid.toml.key" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ mustToJson . }}{{ end -}}
{{- end -}}

{{/* JSON's strings are strings of TOML too. */}}
{{- define "awsvid.toml.value" -}}
{{- if kindIs "slice" . -}}
[{{ range $i, $item := . }}{{ if $i }}, {{ end }}{{ include "awsvid.toml.value" $item }}{{ end }}]
{{- else if kindIs "map" . -}}
{ {{- range $i, $key := keys . | sortAlpha }}{{ if $i }},{{ end }} {{ include "awsvid.toml.key" $key }} = {{ include "awsvid.toml.value" (get $ $key) }}{{ end }} }
{{- else if kindIs "float64" . -}}
{{- if eq (floor .) . }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- else if kindIs "invalid" . -}}
{{- fail "a list in config has a null, which TOML cannot express; remove it" -}}
{{- else -}}
{{- mustToRawJson . -}}
{{- end -}}
{{- end -}}
