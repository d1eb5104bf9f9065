#!/bin/sh
# Sets up a fresh clone, under the name that an older service had for it.
cd "$(dirname "$0")/.." && exec make install
