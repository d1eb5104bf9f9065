#!/bin/sh
# Builds the images, under the name that an older service had for it.
exec "$(dirname "$0")/build-images" "$@"
