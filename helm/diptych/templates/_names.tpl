{{- define "diptych.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- .Values.fullnameOverride | default (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) -}}
{{- end }}

{{- define "diptych.selector" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "diptych.labels" -}}
{{ include "diptych.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "diptych.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion (ternary "cuda" "cpu" (gt (int (include "diptych.gpus" .)) 0))) }}
{{- end -}}
{{- end }}

{{- /* The groups of pods there are, as JSON; the head comes first. */ -}}
{{- define "diptych.groups" -}}
{{- eq .Values.supervisorPod "head" | ternary (list "head" "prefill" "decode") (list "head" "router" "prefill" "decode") | toJson -}}
{{- end }}

{{- /* How many GPUs a pod of prefill and one of decode have. */ -}}
{{- define "diptych.gpus" -}}
{{- $gpus := 0 -}}
{{- range $group := list "prefill" "decode" -}}
{{- $gpus = add $gpus (int (include "diptych.settings" (dict "root" $ "group" $group) | fromJson).gpus) -}}
{{- end -}}
{{- $gpus -}}
{{- end }}

{{- define "diptych.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "diptych.fullname" .) "default") -}}
{{- end }}

{{- define "diptych.cacheClaim" -}}
{{- .Values.cache.claimName | default (printf "%s-cache" (include "diptych.fullname" .)) -}}
{{- end }}

{{- define "diptych.authSecret" -}}
{{- .Values.ray.auth.secretName | default (include "diptych.fullname" .) -}}
{{- end }}

{{- /* The settings of a group's pods, as JSON: those of `pod`, and the group's own in their place. */ -}}
{{- define "diptych.settings" -}}
{{- $settings := deepCopy .root.Values.pod -}}
{{- range $key, $value := index .root.Values .group }}{{ $_ := set $settings $key $value }}{{ end -}}
{{- $settings | toJson -}}
{{- end }}

{{- /* How the workers of a phase lie on pods, as JSON. `ranks`: of the largest worker. */ -}}
{{- define "diptych.shape" -}}
{{- $section := index .root.Values.config .phase | default dict -}}
{{- $workers := 0 }}{{ $ranks := 1 -}}
{{- range $group := $section.groups | default (list $section) -}}
{{- $workers = add $workers (hasKey $group "workers" | ternary $group.workers 1) -}}
{{- $stages := len ($group.stages | default list) | default (int ($group.pp | default 1)) -}}
{{- $ranks = max $ranks (mul (int ($group.tp | default 1)) $stages) -}}
{{- end -}}
{{- $pods := int (index .root.Values .phase).podsPerWorker -}}
{{- dict "workers" $workers "ranks" $ranks "podsPerWorker" $pods "ranksPerPod" (div (sub (add $ranks $pods) 1) $pods) | toJson -}}
{{- end }}
