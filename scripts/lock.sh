#!/usr/bin/env bash
# Write requirements.lock, the versions and checksums of an environment in which the tests passed, and its SBOM.
#
#   scripts/lock.sh [PYTHON]
#
# PYTHON is the interpreter of that environment, by default .venv/bin/python. The tools get an environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/tools"
"$folder/tools/bin/pip" install -q uv cyclonedx-bom
"$python" -c '
from importlib.metadata import distributions
for each in distributions():
    is_local = each.read_text("direct_url.json") is not None  # unlike a package from an index
    if not is_local and each.name not in ("pip", "setuptools"):  # these come with the environment
        print(each.name, each.version.partition("+")[0], sep="==")  # the lock leaves open for which device torch was built
' > "$folder/installed.txt"
"$folder/tools/bin/uv" pip compile -q --universal --generate-hashes --no-annotate --no-header --no-emit-index-url \
    --python-version 3.11 --all-extras --constraint "$folder/installed.txt" -o requirements.lock pyproject.toml
"$folder/tools/bin/cyclonedx-py" requirements requirements.lock --pyproject pyproject.toml --mc-type library \
    --output-reproducible --validate -o sbom.cdx.json
