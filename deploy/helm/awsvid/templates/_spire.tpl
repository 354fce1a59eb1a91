{{/* Returns the values that SPIRE's Helm chart needs, as YAML. */}}
{{- define "awsvid.spireValues" -}}
{{- $path := printf "/ns/%s/sa/awsvid" .Release.Namespace -}}
{{- if eq .Values.source "spiffe-broker" -}}
spire-agent:
  sockets:
    broker: { enabled: true, mountOnHost: true }
  brokerAPI:
    brokers:
      awsvid:
        enabled: true
        idTemplate: "spiffe://{{ "{{ .TrustDomain }}" }}{{ $path }}"
        allowedReferenceTypes:
          - typeURL: type.googleapis.com/spiffe.broker.KubernetesObjectReference
            allowOverTCP: false
  workloadAttestors:
    k8s:
      brokerAPI:
        accessPolicy: enforced
        brokers:
          awsvid: { enabled: true }
{{- else if eq .Values.source "spire-delegated" -}}
spire-agent:
  sockets:
    admin: { enabled: true, mountOnHost: true }
  authorizedDelegates: [{{ $path }}]
  workloadAttestors:
    k8s:
      # Otherwise a request during a postStart hook waits until the hook has ended.
      disableContainerSelectors: true
{{- end -}}
{{- end -}}
