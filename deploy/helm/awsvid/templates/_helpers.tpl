{{/* Returns awsvid's image. */}}
{{- define "awsvid.image" -}}
{{- $image := .Values.image -}}
{{- $name := printf "%s/%s" $image.registry $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Returns awsvid's own SPIFFE ID. */}}
{{- define "awsvid.spiffeID" -}}
{{- printf "spiffe://%s/ns/%s/sa/awsvid" .Values.spire.trustDomain .Release.Namespace -}}
{{- end -}}

{{/* Returns the name of the ConfigMap with awsvid.toml. */}}
{{- define "awsvid.configMap" -}}
{{- default "awsvid" .Values.existingConfigMap -}}
{{- end -}}

{{/*
Returns by which object pods get their variables: policy-v1, policy-v1beta1, kyverno or none.
`helm template` knows API groups, but not kinds, so the version of Kubernetes counts as well.
*/}}
{{- define "awsvid.environment" -}}
{{- $apis := .Capabilities.APIVersions -}}
{{- $mode := .Values.environment.mode -}}
{{- if ne $mode "auto" -}}
{{- $mode -}}
{{- else if or ($apis.Has "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy") (semverCompare ">=1.36.0-0" .Capabilities.KubeVersion.Version) -}}
policy-v1
{{- else if $apis.Has "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy" -}}
policy-v1beta1
{{- else if or ($apis.Has "kyverno.io/v1/ClusterPolicy") ($apis.Has "kyverno.io/v1") -}}
kyverno
{{- else -}}
none
{{- end -}}
{{- end -}}

{{/* Returns the variables about EC2's instance metadata service. */}}
{{- define "awsvid.metadataVariables" -}}
{{- if eq .Values.imds.mode "off" -}}
- { name: AWS_EC2_METADATA_DISABLED, value: "true" }
{{- else -}}
- { name: AWS_EC2_METADATA_SERVICE_ENDPOINT, value: "http://127.0.0.1:974/" }
- { name: AWS_EC2_METADATA_V1_DISABLED, value: "true" }
{{- end -}}
{{- end -}}

{{/* Returns the port of the metrics, as `[listen] admin` has it. */}}
{{- define "awsvid.metricsPort" -}}
{{- $config := include "awsvid.config" . | fromYaml -}}
{{- regexFind "[0-9]+$" $config.listen.admin -}}
{{- end -}}

{{/* Ends with an error if a value is a placeholder. */}}
{{- define "awsvid.strict" -}}
{{- if .Values.strict -}}
{{- if regexMatch "(^|\\.)example\\.org$" .Values.spire.trustDomain -}}
{{- fail "spire.trustDomain is the placeholder example.org; set it to the trust domain of your SPIRE" -}}
{{- end -}}
{{- if not .Values.existingConfigMap -}}
{{- $config := include "awsvid.toml" . -}}
{{- range $placeholder := list "example.org" "123456789012" -}}
{{- if regexMatch (printf "(^|[^a-z0-9-])%s($|[^a-z0-9.-])" (regexQuoteMeta $placeholder)) $config -}}
{{- fail (printf "config has the placeholder %s; set config.role to roles of your own" $placeholder) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Returns a string as a literal of CEL. JSON's strings are literals of CEL too. */}}
{{- define "awsvid.celString" -}}
{{- mustToRawJson . -}}
{{- end -}}
