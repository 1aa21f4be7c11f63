#!/usr/bin/env bash
# Sets the suite up in this folder, without a network: bash install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
unset PYTHONHOME PYTHONPATH

python=""
for each in ${PYTHON:+"$PYTHON"} python@PYTHON@ python3 python; do
    if "$each" -c "@CHECK@" 2>/dev/null; then python=$each; break; fi
done
if [ -z "$python" ]; then
    echo "This bundle is for Python @PYTHON@ on @PLATFORM@, which was not found here;" \
        "install it, or name it: PYTHON=/path/to/python bash install.sh" >&2
    exit 1
fi

"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --find-links wheels -r requirements.txt -e .
touch .venv/.ready # for make, where there is one
.venv/bin/python -m helpers.suite.doctor
echo "Open the notebooks: .venv/bin/python -m jupyterlab notebooks"
