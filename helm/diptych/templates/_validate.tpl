{{- /* What a schema cannot say. Each refusal is a sentence that begins with the value's name. */ -}}
{{- define "diptych.validate" -}}
{{- $values := .Values }}{{ $config := .Values.config -}}
{{- $name := include "diptych.fullname" . -}}
{{- if gt (len $name) 40 -}}
{{- fail (printf "fullnameOverride: the name %s has %d characters; KubeRay cuts names above 40 or so, so give one of at most 40." $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" $name) -}}
{{- fail (printf "fullnameOverride: the name %s begins with no letter, as Services' names must; give another." $name) -}}
{{- end -}}
{{- include "diptych.validateConfig" . -}}
{{- include "diptych.validateModel" . -}}
{{- range $phase := list "prefill" "decode" -}}{{- include "diptych.validatePhase" (dict "root" $ "phase" $phase) -}}{{- end -}}
{{- $on := dict -}}
{{- range $phase := list "prefill" "decode" -}}
{{- $gpus := int (include "diptych.settings" (dict "root" $ "group" $phase) | fromJson).gpus -}}
{{- if int (include "diptych.shape" (dict "root" $ "phase" $phase) | fromJson).workers -}}{{ $_ := set $on $phase $gpus }}{{ end -}}
{{- end -}}
{{- $without := list -}}
{{- range $phase, $gpus := $on -}}{{ if not $gpus }}{{ $without = append $without $phase }}{{ end }}{{- end -}}
{{- if and $without (lt (len $without) (len $on)) (ne ($config.device | default "") "cpu") -}}
{{- fail (printf "%s.gpus is 0, and the other phase has GPUs: KV moves between GPUs, or between CPUs, so give both, or none." (first $without)) -}}
{{- end -}}
{{- range $group := include "diptych.groups" . | fromJsonArray -}}
{{- $settings := include "diptych.settings" (dict "root" $ "group" $group) | fromJson -}}
{{- $least := eq $group $values.supervisorPod | ternary (add 60 (int $values.router.preStopDelaySeconds)) 30 | int -}}
{{- if lt (int $settings.terminationGracePeriodSeconds) $least -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %d: draining and ending takes up to %d." $group (int $settings.terminationGracePeriodSeconds) $least) -}}
{{- end -}}
{{- end -}}
{{- with $values.security -}}
{{- if not (or .apiKeys.secretName .allowUnauthenticated (dig "security" "jwt" false ($values.config | default dict))) -}}
{{- fail "security.apiKeys.secretName names no secret, so whoever reaches the router would be served. Make one with `diptych keys` and `kubectl create secret generic`, set config.security.jwt to take an identity provider's tokens, or set security.allowUnauthenticated to true." -}}
{{- end -}}
{{- end -}}
{{- if and $values.security.tls.caKey (not $values.security.tls.secretName) -}}
{{- fail "security.tls.secretName: caKey names the authority in a secret, and no secret is named." -}}
{{- end -}}
{{- if and $values.ray.gcsFaultTolerance.enabled (not $values.ray.gcsFaultTolerance.redisAddress) -}}
{{- fail "ray.gcsFaultTolerance.redisAddress: fault tolerance is enabled and has no Redis to keep the state in; give its host:port." -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.host) -}}
{{- fail "ingress.host: the Ingress is enabled and has no host to be for." -}}
{{- end -}}
{{- if and $values.ingress.grpc.enabled (not $values.ingress.grpc.host) -}}
{{- fail "ingress.grpc.host: gRPC takes every path, so its Ingress needs a host of its own." -}}
{{- end -}}
{{- if and $values.ingress.enabled $values.ingress.grpc.enabled (eq $values.ingress.host $values.ingress.grpc.host) -}}
{{- fail (printf "ingress.grpc.host: HTTP and gRPC are both for %s; gRPC needs a host of its own." $values.ingress.host) -}}
{{- end -}}
{{- if and $values.gateway.enabled (not $values.gateway.parentRefs) -}}
{{- fail "gateway.parentRefs: the routes are enabled and belong to no gateway; name one, as [{name: my-gateway}]." -}}
{{- end -}}
{{- if eq (int $values.service.httpPort) (int $values.service.grpcPort) -}}
{{- fail (printf "service.grpcPort: HTTP and gRPC are both at port %d." (int $values.service.grpcPort)) -}}
{{- end -}}
{{- end }}

{{- define "diptych.validateConfig" -}}
{{- $config := .Values.config -}}
{{- range $key, $instead := dict "model.source" "model.from and model.source" "router.host" "nothing: it is 0.0.0.0" "ray.address" "nothing: it is the head's Service" "ray.enabled" "nothing: the pods are Ray's" "security.api_keys" "security.apiKeys.secretName" "security.tls" "security.tls.secretName" "security.internal_tls" "security.internalTls.secretName" "security.allow_unauthenticated" "security.allowUnauthenticated" -}}
{{- $path := splitList "." $key -}}
{{- if hasKey (index $config (first $path) | default dict) (last $path) -}}
{{- fail (printf "config.%s is filled in by the chart; in its place there is %s." $key $instead) -}}
{{- end -}}
{{- end -}}
{{- if $config.paired -}}
{{- fail "config.paired: a pair of workers shares a node of the Ray cluster, and here each pod is one, of a single phase." -}}
{{- end -}}
{{- $router := $config.router | default dict -}}
{{- range $key := list "http_port" "grpc_port" -}}
{{- if lt (int (index $router $key)) 1024 -}}
{{- fail (printf "config.router.%s is %v: the router has no rights for ports below 1024, and probes need to know the port, so 0 is none either." $key (index $router $key)) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "http_port" "grpc_port" -}}
{{- if has (int (index $router $key)) (list 6379 8080 8265 10001 52365) -}}
{{- fail (printf "config.router.%s is %v, which Ray uses in every pod." $key (index $router $key)) -}}
{{- end -}}
{{- end -}}
{{- if eq (int $router.http_port) (int $router.grpc_port) -}}
{{- fail (printf "config.router.grpc_port: both faces would listen on %d." (int $router.grpc_port)) -}}
{{- end -}}
{{- $prefill := int (include "diptych.shape" (dict "root" . "phase" "prefill") | fromJson).workers -}}
{{- $local := $router.local_prefill | default "auto" -}}
{{- if and (eq $prefill 0) (eq $local "never") -}}
{{- fail "config.prefill.workers is 0 and config.router.local_prefill is never: nobody could read a prompt." -}}
{{- end -}}
{{- if and (gt $prefill 0) (eq $local "always") -}}
{{- fail "config.router.local_prefill is always, so prefill workers would have nothing to do: set config.prefill.workers to 0." -}}
{{- end -}}
{{- end }}

{{- define "diptych.validateModel" -}}
{{- $model := .Values.model -}}
{{- if and (ne $model.from "image") (not $model.source) -}}
{{- fail (printf "model.source: a model from %s has to be named." $model.from) -}}
{{- end -}}
{{- if and (eq $model.from "hub") (gt (len (splitList "/" $model.source)) 2) -}}
{{- fail (printf "model.source: %s is no name of the hub, as owner/name." $model.source) -}}
{{- end -}}
{{- if and (eq $model.from "pvc") (not $model.pvc.claimName) -}}
{{- fail "model.pvc.claimName: the model comes from a volume, so name its claim." -}}
{{- end -}}
{{- if and (eq $model.from "objectStore") (not $model.objectStore.secretName) -}}
{{- fail "model.objectStore.secretName: name the secret that says where the store is and who you are (RCLONE_CONFIG_STORE_TYPE and so on)." -}}
{{- end -}}
{{- if and (eq .Values.cache.type "pvc") (not .Values.cache.claimName) (not (has "ReadWriteMany" .Values.cache.accessModes)) -}}
{{- fail "cache.accessModes: router and workers are several pods and share the volume, so it has to be ReadWriteMany; else use cache.type emptyDir." -}}
{{- end -}}
{{- end }}

{{- define "diptych.validatePhase" -}}
{{- $phase := .phase }}{{ $root := .root -}}
{{- $shape := include "diptych.shape" . | fromJson -}}
{{- $workers := int $shape.workers }}{{ $ranks := int $shape.ranks }}{{ $pods := int $shape.podsPerWorker }}{{ $each := int $shape.ranksPerPod -}}
{{- $settings := include "diptych.settings" (dict "root" $root "group" $phase) | fromJson -}}
{{- if and (eq $phase "decode") (eq $workers 0) -}}
{{- fail "config.decode.workers is 0: nobody could write an answer." -}}
{{- end -}}
{{- if mod $ranks $pods -}}
{{- fail (printf "%s.podsPerWorker is %d, and a worker has %d ranks (tp × pp): they cannot be shared evenly." $phase $pods $ranks) -}}
{{- end -}}
{{- if not (regexMatch "^[1-9][0-9]*$" (toString $settings.resources.limits.cpu)) -}}
{{- fail (printf "%s.resources.limits.cpu is %v: Ray counts whole CPUs, so give a whole number." $phase $settings.resources.limits.cpu) -}}
{{- end -}}
{{- $threads := int (dig $phase "threads" 1 $root.Values.config) -}}
{{- $cpus := int (toString $settings.resources.limits.cpu) -}}
{{- if gt (mul $threads $each) $cpus -}}
{{- fail (printf "%s.resources.limits.cpu is %d: the %d ranks of a pod with config.%s.threads %d do not fit." $phase $cpus $each $phase $threads) -}}
{{- end -}}
{{- if and (int $settings.gpus) (ne (int $settings.gpus) $each) -}}
{{- fail (printf "%s.gpus is %d, and a pod has %d ranks, each of which takes one GPU." $phase (int $settings.gpus) $each) -}}
{{- end -}}
{{- $most := int (index $root.Values.autoscaling $phase).maxWorkers -}}
{{- if and $root.Values.autoscaling.enabled (lt $most $workers) -}}
{{- fail (printf "autoscaling.%s.maxWorkers is %d, and config asks for %d workers at the start." $phase $most $workers) -}}
{{- end -}}
{{- end }}
