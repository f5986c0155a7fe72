#!/usr/bin/env bash
# Builds llama.cpp's server, and with it the libllama that both sides load, from the source of llama-cpp-python.
# Usage: bench/build_peer.sh [FOLDER]     FOLDER defaults to ~/.cache/nimbos-peer
# Needs Python with pip and a C++ compiler; takes about 20 minutes on two cores. Prints the folder for --peer-dir.
# CFLAGS and CXXFLAGS are honoured, e.g. "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" to leave out an instruction set.
set -euo pipefail
version=0.3.36
python=${PYTHON:-python3}
folder=${1:-$HOME/.cache/nimbos-peer}
source=$folder/llama_cpp_python-$version/vendor/llama.cpp
bin=$source/build/bin

if [ ! -x "$bin/llama-server" ]; then
  mkdir -p "$folder"
  if [ ! -d "$source" ]; then
    # Of this package alone: its build tools may come as wheels, for they only read its metadata here.
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder" \
      "llama-cpp-python==$version" >&2
    tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
  fi
  "$python" -m venv "$folder/tools"
  "$folder/tools/bin/pip" install --quiet cmake ninja >&2
  export PATH=$folder/tools/bin:$PATH
  cmake -S "$source" -B "$source/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
    -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF >&2
  cmake --build "$source/build" --target llama-server --parallel "$(nproc)" >&2
fi
echo "$bin"
