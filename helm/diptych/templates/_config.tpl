{{- /* What the model is called by the processes: a path in the pods, or the hub's name. */ -}}
{{- define "diptych.source" -}}
{{- if eq .Values.model.from "pvc" -}}
/models/{{ trimPrefix "/" .Values.model.source }}
{{- else if eq .Values.model.from "objectStore" -}}
/var/lib/diptych/sources/{{ base .Values.model.source }}
{{- else -}}
{{- .Values.model.source -}}
{{- end -}}
{{- end }}

{{- /* The config file: `config`, and what only the chart knows. Threads are the pod's CPUs, shared by the ranks on it. */ -}}
{{- define "diptych.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- with include "diptych.source" . -}}
{{- $_ := set $config "model" (set ($config.model | default dict) "source" .) -}}
{{- end -}}
{{- range $phase := list "prefill" "decode" -}}
{{- $section := index $config $phase | default dict -}}
{{- if not (hasKey $section "threads") -}}
{{- $cpus := int (toString (index $.Values $phase).resources.limits.cpu) -}}
{{- $ranks := int (include "diptych.shape" (dict "root" $ "phase" $phase) | fromJson).ranksPerPod -}}
{{- $_ := set $section "threads" (max 1 (div $cpus $ranks)) -}}
{{- end -}}
{{- $_ := set $config $phase $section -}}
{{- end -}}
{{- if and (gt (int (include "diptych.gpus" .)) 0) (not (hasKey $config "device")) }}{{ $_ := set $config "device" "cuda" }}{{ end -}}
{{- $_ := set $config "router" (set ($config.router | default dict) "host" "0.0.0.0") -}}
{{- $address := printf "%s-head-svc.%s.svc:6379" (include "diptych.fullname" .) .Release.Namespace -}}
{{- $_ := set $config "ray" (merge (dict "enabled" true "address" $address) ($config.ray | default dict) (dict "wait_s" 600)) -}}
{{- $security := $config.security | default dict -}}
{{- if .Values.security.apiKeys.secretName }}{{ $_ := set $security "api_keys" (printf "/etc/diptych/keys/%s" .Values.security.apiKeys.key) }}{{ end -}}
{{- if .Values.security.allowUnauthenticated }}{{ $_ := set $security "allow_unauthenticated" true }}{{ end -}}
{{- if .Values.security.tls.secretName -}}
{{- $files := dict "cert" "/etc/diptych/tls/tls.crt" "key" "/etc/diptych/tls/tls.key" -}}
{{- with .Values.security.tls.caKey }}{{ $_ := set $files "ca" (printf "/etc/diptych/tls/%s" .) }}{{ end -}}
{{- $_ := set $security "tls" $files -}}
{{- end -}}
{{- if .Values.security.internalTls.secretName -}}
{{- $there := "/etc/diptych/internal-tls" -}}
{{- $files := dict "ca" (printf "%s/ca.crt" $there) "cert" (printf "%s/tls.crt" $there) "key" (printf "%s/tls.key" $there) -}}
{{- $_ := set $security "internal_tls" $files -}}
{{- end -}}
{{- if $security }}{{ $_ := set $config "security" $security }}{{ end -}}
{{- toYaml $config -}}
{{- end }}

{{- /* The config but for the numbers of workers: only a change of this makes other pods. KubeRay adds pods to those that are there. */ -}}
{{- define "diptych.fixedConfig" -}}
{{- $config := include "diptych.config" . | fromYaml -}}
{{- range $phase := list "prefill" "decode" }}{{ $_ := unset (index $config $phase) "workers" }}{{ end -}}
{{- toYaml $config -}}
{{- end }}
