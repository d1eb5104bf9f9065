#!/usr/bin/env bash
# Every call of claude-agent-http by curl, as its users' scripts make them. Usage: claude-agent-http.sh URL
set -euo pipefail
url=$1
id='[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}'
time='[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+\+00:00'
body=

# expect STATUS PATTERN CURL-ARGUMENTS…: the status, and the whole body as an extended regular expression
expect() {
  local status=$1 pattern=$2 answer
  shift 2
  answer=$(curl --silent --show-error --max-time 60 --write-out '\n%{http_code}' "$@")
  body=${answer%$'\n'*}
  if [[ ${answer##*$'\n'} != "$status" || ! $body =~ ^($pattern)$ ]]; then
    printf 'curl %s\nanswered %s\n%s\nand not %s\n%s\n' "$*" "${answer##*$'\n'}" "$body" "$status" "$pattern" >&2
    exit 1
  fi
}
post() { expect "$1" "$2" -X POST "$url$3" -H 'Content-Type: application/json' -d "$4"; }
session() { echo "\{\"session_id\":\"$id\",\"user_id\":\"alice\",\"cwd\":\"/.*/alice/project\",\"created_at\":\"$time\",\"last_active_at\":\"$time\",\"message_count\":$1,\"status\":\"active\",\"metadata\":\{\"a\":1\}\}"; }
frame() { echo "data: \{\"type\":\"$1\",\"text\":$2,\"tool_name\":$3,\"tool_input\":$4,\"error\":$5\}"; }

expect 200 '\{"name":".+","version":".+","docs":"/docs","health":"/health"\}' "$url/"
expect 200 '\{"status":"healthy","version":"[^"]+","active_sessions":0,"in_memory_clients":0,"memory_mb":[0-9]+\.[0-9]+,"storage_type":"sqlite","uptime_seconds":[0-9]+\.[0-9]+\}' "$url/health"

post 201 "$(session 0)" /api/v1/sessions '{"user_id":"alice","subdir":"project","metadata":{"a":1},"model_of_2023":true}'
[[ $body =~ $id ]] && session=${BASH_REMATCH[0]}
expect 200 "\[\"$session\"\]" "$url/api/v1/sessions?user_id=alice"
expect 200 '\[\]' "$url/api/v1/sessions?user_id=bob"
expect 200 "\[\"$session\"\]" "$url/api/v1/sessions"
expect 200 "$(session 0)" "$url/api/v1/sessions/$session"
expect 404 '\{"detail":"Session not found"\}' "$url/api/v1/sessions/none"
expect 422 '\{"detail":\[\{"type":"[^"]+","loc":\["body","user_id"\],"msg":.*\}\]\}' -X POST "$url/api/v1/sessions" -H 'Content-Type: application/json' -d '{"user_id":"../root"}'
expect 422 '\{"detail":\[.*Path traversal.*\]\}' -X POST "$url/api/v1/sessions" -H 'Content-Type: application/json' -d '{"user_id":"alice","subdir":"a/../b"}'
expect 422 '\{"detail":\[.*\]\}' -X POST "$url/api/v1/sessions" -H 'Content-Type: application/json' -d '{'

post 200 "\{\"session_id\":\"$session\",\"text\":\"This is turn 1 of our conversation\. You said: .*hello.*\",\"tool_calls\":\[\],\"timestamp\":\"$time\"\}" /api/v1/chat "{\"session_id\":\"$session\",\"message\":\"hello\"}"
post 200 "\{\"session_id\":\"$session\",\"text\":\"OneTwo.*\",\"tool_calls\":\[\{\"tool\":\"Bash\",\"input\":\{\"command\":\"echo hi\"[^}]*\}\}\],\"timestamp\":\"$time\"\}" /api/v1/chat "{\"session_id\":\"$session\",\"message\":\"[[say: One]] [[bash: echo hi]] [[say: Two]]\"}"
post 422 '\{"detail":\[.*\]\}' /api/v1/chat "{\"session_id\":\"$session\",\"message\":\"  \"}"
post 422 '\{"detail":\[.*\]\}' /api/v1/chat "{\"session_id\":\"$session\",\"message\":\"x\",\"timeout\":601}"
post 404 '\{"detail":"Session not found or expired"\}' /api/v1/chat '{"session_id":"none","message":"hello"}'
post 504 '\{"detail":"Request timed out after 1 seconds"\}' /api/v1/chat "{\"session_id\":\"$session\",\"message\":\"[[wait: 30]]\",\"timeout\":1}"
nl=$'\n'
post 200 "$(frame text_delta '"Hi"' null null null)$nl$nl$(frame tool_use null '"Bash"' '\{[^}]*\}' null)$nl$nl($(frame text_delta '"[^"]*"' null null null)$nl$nl)+$(frame 'done' null null null null)$nl$nl" /api/v1/chat/stream "{\"session_id\":\"$session\",\"message\":\"[[say: Hi]] [[bash: true]] [[say: Bye]]\"}"
post 200 "$(frame error null null null '"Session not found or expired"')$nl$nl" /api/v1/chat/stream '{"session_id":"none","message":"hello"}'

expect 200 "$(session 4)" -X POST "$url/api/v1/sessions/$session/resume"
expect 404 '\{"detail":"Session not found or expired"\}' -X POST "$url/api/v1/sessions/none/resume"
expect 204 '' -X DELETE "$url/api/v1/sessions/$session"
expect 404 '\{"detail":"Session not found"\}' -X DELETE "$url/api/v1/sessions/$session"
post 404 '\{"detail":"Session not found or expired"\}' /api/v1/chat "{\"session_id\":\"$session\",\"message\":\"hello\"}"
expect 200 '\{"openapi".*"/api/v1/chat/stream".*\}' "$url/openapi.json"
expect 200 '.*swagger.*' "$url/docs"
echo 'all as it was'
