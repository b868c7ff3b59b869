{{- /* The one pod template, of `root` and `group` (head, router, prefill, decode). Its first container is Ray's: KubeRay writes the
`ray start` line, the probes and the environment of Ray into it. */ -}}
{{- define "diptych.pod" -}}
{{- $root := .root }}{{ $group := .group -}}
{{- $settings := include "diptych.settings" . | fromJson -}}
{{- $works := has $group (list "prefill" "decode") -}}
{{- $supervises := eq $group $root.Values.supervisorPod -}}
{{- $loads := or $works $supervises -}}
metadata:
  labels:
    {{- include "diptych.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $group }}
    {{- with $settings.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    diptych/config: {{ include "diptych.fixedConfig" $root | sha256sum }}
    {{- with $settings.annotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "diptych.serviceAccount" $root }}
  automountServiceAccountToken: {{ and (eq $group "head") $root.Values.autoscaling.enabled }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ int $settings.terminationGracePeriodSeconds }}
  {{- if $supervises }}
  # Ray's node must see the process of its driver, which is in the other container.
  shareProcessNamespace: true
  {{- end }}
  securityContext:
    runAsNonRoot: true
    {{- toYaml $root.Values.securityContext | nindent 4 }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" }}
  {{- with index $settings $key }}
  {{ $key }}: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- with $settings.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{ toYaml . | nindent 6 }}
      {{- if not .labelSelector }}
      labelSelector:
        matchLabels:
          {{- include "diptych.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ $group }}
      {{- end }}
    {{- end }}
  {{- end }}
  {{- with $settings.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $settings.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if and (eq $root.Values.model.from "objectStore") $loads }}
  initContainers:
    - name: copy-model
      image: {{ $root.Values.model.objectStore.image }}
      args: [copy, {{ printf "store:%s" $root.Values.model.source | quote }}, {{ include "diptych.source" $root }}, --transfers=8, --stats=30s, --stats-one-line, -v]
      envFrom:
        - secretRef: {name: {{ $root.Values.model.objectStore.secretName }}}
      env:
        - {name: HOME, value: /tmp}
      resources:
        requests: {cpu: 500m, memory: 512Mi}
        limits: {cpu: "2", memory: 2Gi}
      securityContext: {{ include "diptych.containerSecurity" (dict "rdma" false) | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /var/lib/diptych}
  {{- end }}
  containers:
    - name: ray
      {{- include "diptych.container" (dict "root" $root "group" $group "settings" $settings "supervises" $supervises "loads" $loads) | nindent 6 }}
      resources:
        {{- $resources := eq $group "router" | ternary $settings.rayResources $settings.resources | deepCopy }}
        {{- if $works }}
        {{- range $name, $count := dict $settings.gpuResource $settings.gpus $settings.rdma.resource $settings.rdma.count }}
        {{- if and $name (int $count) }}
        {{- range $kind := list "requests" "limits" }}{{ $_ := set (index $resources $kind) $name (int $count) }}{{ end }}
        {{- end }}
        {{- end }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      {{- if eq $group "head" }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
      {{- end }}
      {{- if $works }}
      lifecycle:
        preStop:
          # What the ranks here have they finish, and take nothing new, before Ray's end takes them along.
          exec: {command: [python, -m, diptych.cluster.programs.vacate, --within, {{ sub (int $settings.terminationGracePeriodSeconds) 15 | toString | quote }}]}
      {{- end }}
    {{- if $supervises }}
    {{- $own := $root.Values.router }}
    - name: diptych
      {{- include "diptych.container" (dict "root" $root "group" $group "settings" $settings "supervises" $supervises "loads" $loads) | nindent 6 }}
      {{- $up := "diptych up --file /etc/diptych/config/cluster.yaml" }}
      {{- if eq $group "head" }}
      # Elsewhere an init container of KubeRay's waits for the head.
      command: [sh, -c, "until ray health-check --address 127.0.0.1:6379 > /dev/null 2>&1; do sleep 1; done; exec {{ $up }}"]
      {{- else }}
      command: {{ splitList " " $up | toYaml | nindent 8 }}
      {{- end }}
      resources: {{ toYaml $own.resources | nindent 8 }}
      {{- $router := include "diptych.config" $root | fromYaml | dig "router" dict }}
      {{- $scheme := empty $root.Values.security.tls.secretName | ternary "HTTP" "HTTPS" }}
      ports:
        - {name: http, containerPort: {{ int $router.http_port }}}
        - {name: grpc, containerPort: {{ int $router.grpc_port }}}
      # The router answers once the model is prepared and it has read it.
      startupProbe:
        httpGet: {path: /live, port: http, scheme: {{ $scheme }}}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: {{ div (int $own.startupSeconds) 5 }}
      # Alive: it answers.
      livenessProbe:
        httpGet: {path: /live, port: http, scheme: {{ $scheme }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      # Ready: there are workers to serve a request with, and it does not drain.
      readinessProbe:
        httpGet: {path: /health, port: http, scheme: {{ $scheme }}}
        periodSeconds: 2
        timeoutSeconds: 3
        failureThreshold: 2
      lifecycle:
        preStop:
          exec: {command: [sh, -c, "sleep {{ int $own.preStopDelaySeconds }}; exec diptych down --all"]}
    {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $settings.sharedMemory }}}
    - name: home
      {{- if and (eq $root.Values.cache.type "pvc") $loads }}
      persistentVolumeClaim: {claimName: {{ include "diptych.cacheClaim" $root }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $root.Values.cache.size }}}
      {{- end }}
    {{- if and (eq $root.Values.model.from "pvc") $loads }}
    - name: models
      persistentVolumeClaim: {claimName: {{ $root.Values.model.pvc.claimName }}, readOnly: true}
    {{- end }}
    {{- with $root.Values.security.internalTls.secretName }}
    - name: internal-tls
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- if $supervises }}
    - name: config
      configMap: {name: {{ include "diptych.fullname" $root }}}
    {{- with $root.Values.security.apiKeys.secretName }}
    - name: keys
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- with $root.Values.security.tls.secretName }}
    - name: tls
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- end }}
    {{- with $settings.volumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}

{{- /* What the containers of a pod have in common. */ -}}
{{- define "diptych.container" -}}
{{- $values := .root.Values -}}
image: {{ include "diptych.image" .root }}
imagePullPolicy: {{ $values.image.pullPolicy }}
securityContext: {{ include "diptych.containerSecurity" (dict "rdma" (and (has .group (list "prefill" "decode")) .settings.rdma.resource)) | nindent 2 }}
env:
  - {name: HOME, value: /tmp}
  - {name: XDG_RUNTIME_DIR, value: /tmp/run}
  - {name: DIPTYCH_HOME, value: /var/lib/diptych}
  - {name: HF_HOME, value: /var/lib/diptych/huggingface}
  - {name: PYTHONSAFEPATH, value: "1"}
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  - {name: RAY_prestart_worker_first_driver, value: "0"}
  {{- if $values.ray.auth.enabled }}
  - {name: RAY_AUTH_MODE, value: token}
  - name: RAY_AUTH_TOKEN
    valueFrom: {secretKeyRef: {name: {{ include "diptych.authSecret" .root }}, key: auth_token}}
  {{- end }}
  {{- if and $values.ray.gcsFaultTolerance.enabled .loads }}
  - {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "600"}
  {{- end }}
  {{- if and $values.model.hub.tokenSecret (eq $values.model.from "hub") .loads }}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ $values.model.hub.tokenSecret }}, key: {{ $values.model.hub.tokenKey }}}}
  {{- end }}
  {{- with .settings.env }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .settings.envFrom }}
envFrom: {{ toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: shm, mountPath: /dev/shm}
  - {name: home, mountPath: /var/lib/diptych}
  {{- if and (eq $values.model.from "pvc") .loads }}
  - {name: models, mountPath: /models, readOnly: true}
  {{- end }}
  {{- if $values.security.internalTls.secretName }}
  - {name: internal-tls, mountPath: /etc/diptych/internal-tls, readOnly: true}
  {{- end }}
  {{- if .supervises }}
  - {name: config, mountPath: /etc/diptych/config, readOnly: true}
  {{- if $values.security.apiKeys.secretName }}
  - {name: keys, mountPath: /etc/diptych/keys, readOnly: true}
  {{- end }}
  {{- if $values.security.tls.secretName }}
  - {name: tls, mountPath: /etc/diptych/tls, readOnly: true}
  {{- end }}
  {{- end }}
  {{- with .settings.volumeMounts }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{- define "diptych.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- if .rdma }}
  add: [IPC_LOCK]
  {{- end }}
{{- end }}
