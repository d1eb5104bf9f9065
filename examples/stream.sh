#!/bin/sh
# Opens a session and streams a turn with nothing but curl.
#
#     carrel serve --model-upstream scripted
#     examples/stream.sh [PROMPT]
#
# CARREL_URL and CARREL_KEY say where else and with which key.
set -eu

url=${CARREL_URL:-http://127.0.0.1:8000}
key=${CARREL_KEY:-$(cat carrel-data/admin.key)}
prompt=${1:-[[count: 10 @10]]}

# The prompt as a JSON string.
quoted=$(printf '%s' "$prompt" | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/$/\\n/' | tr -d '\n')

# The key goes to curl through a descriptor: in an argument every user of this machine could read it.
carrel() {
    printf 'header = "Authorization: Bearer %s"\n' "$key" | curl --silent --show-error --fail --config - "$@"
}

session=$(carrel "$url/api/v1/sessions" -H 'Content-Type: application/json' --data '{"title": "curl"}' |
    sed -n 's/^{"id":"\([^"]*\)".*/\1/p')

carrel --no-buffer "$url/api/v1/sessions/$session/turns" \
    -H 'Content-Type: application/json' -H 'Accept: text/event-stream' \
    --data "{\"prompt\": \"$quoted\"}"

carrel --request DELETE "$url/api/v1/sessions/$session"
