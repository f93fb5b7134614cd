#!/usr/bin/env bash
# Builds llama-batched-bench, which `fastdecode bench --backend llamacpp` measures against, for this processor.
#
#     bash scripts/build_llamacpp.sh [DIRECTORY]        default: .llamacpp
#
# From the source package of llama-cpp-python, which brings llama.cpp along.  Wants pip, cmake and a C++ compiler; takes
# about three minutes on two cores.  The last line printed is the binary's path.
set -euo pipefail
directory=$(mkdir -p "${1:-.llamacpp}" && cd "${1:-.llamacpp}" && pwd)
python=${PYTHON:-python3}
cd "$directory"
"$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python "llama-cpp-python==0.3.36"
tar xf llama_cpp_python-*.tar.gz
cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF > cmake.log
cmake --build build --target llama-batched-bench --parallel > build.log 2>&1
echo "$directory/build/bin/llama-batched-bench"
