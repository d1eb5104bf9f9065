#!/usr/bin/env bash
# Starts, stops and removes Carrel in containers: the compose files with the right options, and what they want beforehand.
#
#   ./docker-start.sh                 start as the last time; the first time with SQLite and named volumes
#   ./docker-start.sh --postgres      with PostgreSQL
#   ./docker-start.sh --objects       with snapshots and artifacts in a store of objects (S3) beside it
#   ./docker-start.sh --bind-mounts   with the data in folders of this host (HOST_DB_DIR, HOST_USER_DATA_DIR)
#   ./docker-start.sh --build         build the images anew, then start
#   ./docker-start.sh --stop          stop everything; sessions go on at the next start
#   ./docker-start.sh --down          stop, and remove containers and networks; volumes stay
#
# The first three may be combined. What is chosen is kept in .env (COMPOSE_FILE, COMPOSE_PROFILES), so that
# `docker compose` by itself means the same afterwards.
set -euo pipefail
cd "$(dirname "$0")"

say() { echo "docker-start: $*"; }
fail() { echo "docker-start: $*" >&2; exit 1; }
usage() { sed -n 's/^# \{0,1\}//; 2,13p' "$0"; }

files=(docker-compose.yml) chosen=no build=no action=start
while (($#)); do
    case $1 in
        --postgres) files+=(docker-compose.postgres.yml) chosen=yes ;;
        --bind-mounts) files+=(docker-compose.override.bindmounts.yml) chosen=yes ;;
        --objects) files+=(docker-compose.objects.yml) chosen=yes ;;
        --build) build=yes ;;
        --stop | --down) action=${1#--} ;;
        -h | --help) usage; exit ;;
        *) usage >&2; exit 2 ;;
    esac
    shift
done

if docker compose version >/dev/null 2>&1; then
    compose=(docker compose)
elif docker-compose version --short 2>/dev/null | grep -q '^v\?[2-9]'; then
    compose=(docker-compose)
else
    fail "Docker Compose 2.24 or newer is wanted (Debian and Ubuntu: docker-compose-v2 or docker-compose-plugin)."
fi
docker version >/dev/null 2>&1 || fail "no Docker engine answers: start it, or let this user reach its socket."

setting() { # setting NAME VALUE: in .env, in place of what it was
    local text
    text=$(grep -v "^#\? \?$1=" .env || true)
    (umask 077 && printf '%s\n%s=%s\n' "$text" "$1" "$2" >.env.new)
    mv .env.new .env
}

if [[ ! -e .env ]]; then
    (umask 077 && cp .env.example .env && chmod 600 .env) # it will hold the model's credential
    # Sandboxes are never root, so root's own id is no use here.
    if ((EUID >= 1000 && $(id -g) >= 1000)); then setting UID "$EUID" && setting GID "$(id -g)"; fi
    say "made .env of .env.example"
fi
if [[ $chosen == yes ]]; then
    setting COMPOSE_FILE "$(IFS=:; echo "${files[*]}")"
fi

if [[ $action != start ]]; then
    exec "${compose[@]}" --profile '*' "$action"
fi

value() { # value NAME: what compose will see; the environment wins over .env
    local name=$1 line
    if [[ -n ${!name:-} ]]; then echo "${!name}"; return; fi
    line=$(grep "^$name=" .env | tail -n 1) || true
    line=${line#*=}
    echo "${line%% #*}"
}
credential=
for name in ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN CLAUDE_CODE_OAUTH_TOKEN; do
    [[ -z $(value "$name") ]] || credential=$name
done
if [[ -z $credential && $(value CARREL_MODEL_UPSTREAM) != scripted* ]]; then
    say "no credential for the model is set: put ANTHROPIC_API_KEY or another into .env, and run this again"
fi

version=$(value CARREL_VERSION)
version=${version:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/carrel/__init__.py)}
prefix=$(value CARREL_IMAGE_PREFIX)
prefix=${prefix:-carrel}
for image in "$prefix-gateway:$version" "$prefix-sandbox:$version"; do
    docker image inspect "$image" >/dev/null 2>&1 || build=missing
done
if [[ $build == yes || ($build == missing && $prefix == carrel) ]]; then
    scripts/build-images
fi

"${compose[@]}" up --detach --remove-orphans
say "waiting until it is ready"
for ((i = 0; i < 90; i++)); do
    state=$(docker inspect --format '{{.State.Health.Status}}' "$("${compose[@]}" ps --quiet app)" 2>/dev/null) || state=gone
    [[ $state == healthy ]] && break
    sleep 1
done
if [[ $state != healthy ]]; then
    "${compose[@]}" logs --tail 30 app >&2
    fail "the application is not ready in time; above are its last lines (all: ${compose[*]} logs)"
fi

address=$("${compose[@]}" port app 8000)
say "Carrel is ready at http://$address"
say "the admin key: ${compose[*]} exec app cat /data/db/admin.key"
console=$("${compose[@]}" port objects 9001 2>/dev/null) || console=
if [[ -n $console ]]; then
    say "the store of objects has a console at http://$console"
    say "its keys: ${compose[*]} exec objects tail -n +1 /secrets/access-key /secrets/secret-key"
fi
