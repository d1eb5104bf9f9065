#!/bin/bash
# Opens a session, streams a turn and reads its usage, with nothing but curl.
#
#     carrel serve --model-upstream scripted
#     CARREL_KEY=carrel_sk_… examples/stream.sh [PROMPT]      # a key: carrel keys create --user alice
#
# CARREL_URL says where the server is. With CARREL_KEY unset it is the admin's, from carrel-data/admin.key.
set -euo pipefail

api=${CARREL_URL:-http://127.0.0.1:8000}/api/v1
key=${CARREL_KEY:-$(cat carrel-data/admin.key)}
prompt=${1:-[[count: 10 @10]]}

# The key goes to curl through a descriptor: in an argument every user of this machine could read it.
carrel() {
    printf 'header = "Authorization: Bearer %s"\n' "$key" |
        curl --silent --show-error --fail-with-body --config - --header 'Content-Type: application/json' "$@"
}

# A text as a JSON string.
quoted() {
    printf '%s' "$1" | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/\t/\\t/g' | sed -z -e 's/\n/\\n/g' -e 's/.*/"&"/'
}

made=$(carrel "$api/sessions" --data '{"title": "curl"}') || { echo "$made" >&2; exit 1; }
session=$(sed -n 's/^{"id":"\([^"]*\)".*/\1/p' <<<"$made")
trap 'carrel --request DELETE "$api/sessions/$session"' EXIT

carrel --no-buffer "$api/sessions/$session/turns" --header 'Accept: text/event-stream' \
    --data "{\"prompt\": $(quoted "$prompt")}"

carrel "$api/usage?group_by=model&session_id=$session&format=csv"
