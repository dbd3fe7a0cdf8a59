#!/usr/bin/env bash
# Puts Triton 3.6, the oldest that the kernels must compile with, into .venv/triton-3.6, beside the
# installed one. The tests of ahead-of-time compilation use it where it is there.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT

FOLDER=.venv/triton-3.6
if [ -e "$FOLDER/triton/__init__.py" ]; then exit; fi
rm -rf "$FOLDER.part"
# In .venv only when it is whole.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
    --target "$FOLDER.part" "triton==3.6.*"
mv "$FOLDER.part" "$FOLDER"
