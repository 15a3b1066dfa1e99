#!/usr/bin/env bash
# Run the tests with the lowest and with the newest allowed versions of all dependencies.
#
#   scripts/test_versions.sh [lowest|newest] [PYTEST ARGUMENT...]
#
# Without an argument both run, one after the other. Each gets a new environment in a temporary folder, with the Python
# that the variable PYTHON names.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    lowest | newest) resolutions=("$1"); shift ;;
    *) resolutions=(lowest newest) ;;
esac

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/uv"
"$folder/uv/bin/pip" install -q uv
for resolution in "${resolutions[@]}"; do
    strategy=highest
    [ "$resolution" = newest ] || strategy=lowest-direct
    "${PYTHON:-python3}" -m venv "$folder/$resolution"
    python="$folder/$resolution/bin/python"
    echo "+ $resolution versions"
    "$folder/uv/bin/uv" pip install -q --python "$python" --resolution "$strategy" -e ".[all]" --group dev
    "$folder/uv/bin/uv" pip freeze --python "$python"
    "$python" -m pytest "$@"
done
