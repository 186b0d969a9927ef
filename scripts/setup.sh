#!/bin/sh
# Build .venv from a pinned list.  Usage: setup.sh PYTHON REQUIREMENTS
#
# Everything is installed with --no-deps: the list is complete, and resolving would bring CUDA
# builds of torchvision and torchaudio, which break transformers beside a CPU torch.
set -eu
python=$1
requirements=$2
command -v "$python" >/dev/null 2>&1 || python=python3
"$python" - <<'EOF'
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 15):
    sys.exit(f"rayrl wants Python 3.11 to 3.14, this is {sys.version.split()[0]}: make PYTHON=...")
EOF
[ -x .venv/bin/python ] || "$python" -m venv .venv
# Python compiles what is imported; compiling all 27,000 files now would take a third of the time.
pip=".venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile"

torch=$(grep '^torch==' "$requirements")
if ! .venv/bin/python -c "
import importlib.metadata as m, sys
sys.exit(m.version('torch') != '$torch'.removeprefix('torch=='))" 2>/dev/null; then
    # A wheel at hand (pip's own find-links) first; else uv, which knows PyTorch's CPU builds.
    if ! $pip --no-deps "$torch" 2>/dev/null; then
        $pip uv
        .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps \
            --torch-backend cpu "$torch"
    fi
fi
$pip --no-deps -r "$requirements" -r requirements/dev.txt
$pip --no-deps --no-build-isolation --editable .
