#!/bin/sh
# Carrel whole in one container: run.sh [TAG]. One of the credentials named here is enough. docs/images.md has more.
exec docker run --rm --init --name "${CARREL_NAME:-carrel}" \
    --publish "127.0.0.1:${CARREL_PORT:-8000}:8000" --volume "${CARREL_VOLUME:-carrel-data}:/data" \
    --env ANTHROPIC_API_KEY --env ANTHROPIC_AUTH_TOKEN --env CLAUDE_CODE_OAUTH_TOKEN --env CARREL_MODEL_UPSTREAM \
    "carrel-gateway:${1:-latest}"
