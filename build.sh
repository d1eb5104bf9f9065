#!/bin/sh
# The images; see scripts/build-images for what it takes.
exec "$(dirname "$0")/scripts/build-images" "$@"
