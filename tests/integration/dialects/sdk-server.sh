#!/usr/bin/env bash
# Every call of sdk-server by curl, as its users' scripts make them. Usage: sdk-server.sh URL
set -euo pipefail
url=$1
id='[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}'
time='[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+\+00:00'
cost='[0-9]+\.[0-9]+'
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
nl=$'\n'
end="$nl$nl"
text="data: \{\"type\":\"text\",\"text\":\"([^\"]*)\",\"content\":\"[^\"]*\"\}"
result="data: \{\"type\":\"result\",\"subtype\":\"success\",\"duration_ms\":[0-9]+,\"num_turns\":[0-9]+,\"total_cost_usd\":$cost\}"
tool='data: \{"type":"tool_use","name":"Bash","id":"[^"]+","input":\{[^}]*\}\}'
finish='data: \{"type":"done"\}'

expect 200 '\{"name":".+","version":".+","endpoints":\{.+\}\}' "$url/"
expect 200 "\{\"status\":\"healthy\",\"authenticated\":true,\"active_sessions\":0,\"timestamp\":\"$time\"\}" "$url/health"

post 200 "\{\"response\":\"This is turn 1 of our conversation\. .*\",\"session_id\":null,\"duration_ms\":[0-9]+,\"num_turns\":1,\"total_cost_usd\":$cost\}" /query '{"prompt":"hello","cwd":"/etc","unknown":1}'
post 200 "($text$end)+$tool$end($text$end)+$result$end$finish$end" /query '{"prompt":"[[think: hm]] [[say: A]] [[bash: true]] [[say: B]]","stream":true}'
post 200 "data: \{\"type\":\"thinking\",\"text\":\"hm\"\}$end($text$end)+$result$end$finish$end" /query '{"prompt":"[[think: hm]] [[say: A]]","stream":true,"include_thinking":true}'
post 422 '\{"detail":\[.*\]\}' /query '{"prompt":" "}'
post 422 '\{"detail":\[.*\]\}' /query '{"prompt":"x","permission_mode":"whatever"}'
expect 200 '\{"active_sessions":\[\],"count":0\}' "$url/sessions"

post 200 "\{\"session_id\":\"$id\",\"status\":\"started\",\"initial_response\":null,\"created_at\":\"$time\"\}" /session/start '{}'
[[ $body =~ $id ]] && first=${BASH_REMATCH[0]}
post 200 "\{\"session_id\":\"$id\",\"status\":\"started\",\"initial_response\":\"This is turn 1 of our conversation\. .*\",\"created_at\":\"$time\"\}" /session/start '{"initial_prompt":"hello","model":"haiku","permission_mode":"plan","allowed_tools":["Read"]}'
[[ $body =~ $id ]] && second=${BASH_REMATCH[0]}
expect 200 "\{\"active_sessions\":\[\"$second\",\"$first\"\],\"count\":2\}" "$url/sessions"
expect 200 "\{\"session_id\":\"$second\",\"created_at\":\"$time\",\"active\":true,\"model\":\"haiku\"\}" "$url/session/$second"
expect 200 "\{\"session_id\":\"$first\",\"created_at\":\"$time\",\"active\":true,\"model\":null\}" "$url/session/$first"
post 200 "\{\"session_id\":\"$second\",\"response\":\"This is turn 2 of our conversation\. .*\",\"duration_ms\":[0-9]+\}" "/session/$second/query" '{"prompt":"and again"}'
post 200 "($text$end)+$result$end$finish$end" "/session/$second/query" '{"prompt":"[[say: A]]","stream":true}'
expect 200 "\{\"status\":\"interrupted\",\"session_id\":\"$second\"\}" -X POST "$url/session/$second/interrupt"
post 404 '\{"detail":"Session none not found"\}' /session/none/query '{"prompt":"x"}'
expect 404 '\{"detail":"Session none not found"\}' -X POST "$url/session/none/interrupt"
expect 404 '\{"detail":"Session none not found"\}' "$url/session/none"
expect 200 "\{\"status\":\"closed\",\"session_id\":\"$first\"\}" -X DELETE "$url/session/$first"
expect 404 "\{\"detail\":\"Session $first not found\"\}" -X DELETE "$url/session/$first"
expect 200 "\{\"active_sessions\":\[\"$second\"\],\"count\":1\}" "$url/sessions"
expect 200 '\{"openapi".*"/session/start".*\}' "$url/openapi.json"
expect 200 '.*swagger.*' "$url/docs"
echo 'all as it was'
