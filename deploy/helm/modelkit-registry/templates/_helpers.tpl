{{- define "modelkit-registry.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "modelkit-registry.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "modelkit-registry.labels" -}}
{{ include "modelkit-registry.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "modelkit-registry.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "modelkit-registry.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "modelkit-registry.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{- /* config.yml: what the values say, and over it what `config` says. */ -}}
{{- define "modelkit-registry.config" -}}
{{- $http := dict "addr" ":5000" "draintimeout" (printf "%ds" (int .Values.drainSeconds)) -}}
{{- if .Values.tls.existingSecret }}{{ $_ := set $http "tls" (dict "certificate" "/run/secrets/tls/tls.crt" "key" "/run/secrets/tls/tls.key") }}{{ end -}}
{{- if .Values.httpSecret.existingSecret }}{{ $_ := set $http "secret_file" "/run/secrets/http/secret" }}{{ end -}}
{{- $config := dict "version" "0.1" "log" (dict "formatter" "json") "http" $http -}}
{{- if .Values.htpasswd.existingSecret }}{{ $_ := set $config "auth" (dict "htpasswd" (dict "path" "/run/secrets/htpasswd/htpasswd")) }}{{ end -}}
{{- if eq .Values.storage.type "s3" -}}
{{- $s3 := dict "bucket" .Values.storage.s3.bucket -}}
{{- with .Values.storage.s3.region }}{{ $_ := set $s3 "region" . }}{{ end -}}
{{- with .Values.storage.s3.endpoint }}{{ $_ := set $s3 "regionendpoint" . }}{{ end -}}
{{- with .Values.storage.s3.rootDirectory }}{{ $_ := set $s3 "rootdirectory" . }}{{ end -}}
{{- $_ := set $config "storage" (dict "s3" $s3) -}}
{{- else -}}
{{- $_ := set $config "storage" (dict "filesystem" (dict "rootdirectory" "/var/lib/modelkit-registry")) -}}
{{- end -}}
{{- mustMergeOverwrite $config (deepCopy .Values.config) | toYaml -}}
{{- end }}

{{- define "modelkit-registry.scheme" -}}
{{- if dig "http" "tls" "certificate" "" (include "modelkit-registry.config" . | fromYaml) }}HTTPS{{ else }}HTTP{{ end }}
{{- end }}

{{- define "modelkit-registry.prefix" -}}
{{- dig "http" "prefix" "/" (include "modelkit-registry.config" . | fromYaml) }}
{{- end }}

{{- define "modelkit-registry.probe" -}}
httpGet:
  path: {{ include "modelkit-registry.prefix" .root }}{{ .path }}
  port: http
  scheme: {{ include "modelkit-registry.scheme" .root }}
timeoutSeconds: 5
{{- end }}

{{- /* 1 on a folder: two processes in two pods would need a volume that both can lock. */ -}}
{{- define "modelkit-registry.isReplicated" -}}
{{- if eq .Values.storage.type "s3" }}true{{ end }}
{{- end }}
