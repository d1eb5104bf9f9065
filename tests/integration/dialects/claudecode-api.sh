#!/usr/bin/env bash
# Every call of claudecode-api by curl, as its users' scripts make them. Usage: claudecode-api.sh URL
set -euo pipefail
url=$1
id='[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}'
seconds='"[0-9]{10}"'
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

expect 200 '\{"status":"ok"\}' "$url/health"
for env in dev staging prod; do
  expect 200 "\{\"exists\":true,\"running\":true,\"name\":\"claude-agent-$env\"\}" "$url/api/containers/$env"
done
expect 200 '\{"exists":false,"running":false,"name":"claude-agent-test"\}' "$url/api/containers/test"
post 200 '\{"exists":true,"running":false,"name":"claude-agent-prod"\}' /api/containers/prod/stop ''
post 200 '\{"success":false,"error":"[^"]+"\}' /api/execute '{"env":"prod","prompt":"hello"}'
post 200 '\{"exists":true,"running":true,"name":"claude-agent-prod"\}' /api/containers/prod/start ''

post 200 '\{"success":true,"output":"This is turn 1 of our conversation\. .*"\}' /api/execute '{"env":"dev","prompt":"hello","unknown":1}'
object='\{\\"type\\":\\"result\\",\\"subtype\\":\\"success\\",\\"is_error\\":false,.*\}'
post 200 "\{\"success\":true,\"output\":\".*\",\"json_output\":\"$object\"\}" /api/execute '{"env":"dev","prompt":"hello","jsonOutput":true}'
post 200 '\{"success":false,"error":"[^"]+"\}' /api/execute '{"env":"nowhere","prompt":"hello"}'
post 422 '\{"detail":\[.*\]\}' /api/execute '{"env":"dev","prompt":" "}'

post 200 "\{\"id\":\"$id\",\"sessionId\":\"$id\",\"session_id\":\"$id\",\"env\":\"staging\"\}" /api/sessions '{"env":"staging"}'
[[ $body =~ $id ]] && session=${BASH_REMATCH[0]}
post 200 '\{"success":true,"output":"This is turn 1 .*"\}' /api/execute "{\"env\":\"staging\",\"prompt\":\"hello\",\"sessionId\":\"$session\"}"
post 200 '\{"success":true,"output":"This is turn 2 .*"\}' /api/execute "{\"env\":\"staging\",\"prompt\":\"hello\",\"sessionId\":\"$session\"}"
entry="\{\"id\":\"$session\",\"environment\":\"staging\",\"title\":\"Thread [0-9a-f]{8}\",\"created_at\":$seconds,\"updated_at\":$seconds\}"
expect 200 "\[$entry\]" "$url/api/sessions/staging"
expect 204 '' -X DELETE "$url/api/sessions/staging/$session"
expect 404 '[A-Za-z][^{}]*' -X DELETE "$url/api/sessions/staging/$session"
expect 200 '\[\]' "$url/api/sessions/staging"
echo 'all as it was'
