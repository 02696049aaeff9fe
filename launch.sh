#!/usr/bin/env bash
# Run ember-pp from this checkout: ./launch.sh [key=value ...], --help for more.
# Makes .venv if it is missing; EMBER_PYTHON=... uses another interpreter and installs nothing.
# Decides nothing else: all settings are ember_pp's own.
set -euo pipefail
# shellcheck source=scripts/bootstrap.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/scripts/bootstrap.sh"
ember_environment run
# Files in the folder it is started from, say a random.py, must not stand in for modules.
export PYTHONSAFEPATH=1
exec "$EMBER_PYTHON_PATH" -m ember_pp "$@"
