#!/usr/bin/env bash
# Builds llama.cpp's server, and the libllama that both sides load, from the source distribution of llama-cpp-python.
# Usage: bench/build_peer.sh [FOLDER]   (default ./peer; needs a C++ compiler and pip; cmake and ninja come by pip if missing)
# Prints the folder to give to --peer-dir. About 20 minutes on two cores.
set -euo pipefail
version=0.3.36
folder=$(mkdir -p "${1:-peer}" && cd "${1:-peer}" && pwd)
python=${PYTHON:-python3}
source=$folder/llama_cpp_python-$version
bin=$source/vendor/llama.cpp/build/bin

if [ ! -x "$bin/llama-server" ]; then
  if [ ! -d "$source" ]; then
    # With --no-build-isolation nothing but the archive itself is fetched; its metadata step needs the build backend.
    "$python" -m venv "$folder/tools"
    "$folder/tools/bin/pip" install --quiet scikit-build-core cmake ninja
    PATH=$folder/tools/bin:$PATH "$folder/tools/bin/pip" download --quiet --no-deps --no-build-isolation \
      --no-binary :all: --dest "$folder" "llama-cpp-python==$version" >&2
    tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
  fi
  export PATH=$folder/tools/bin:$PATH
  cmake -S "$source/vendor/llama.cpp" -B "$source/vendor/llama.cpp/build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DGGML_NATIVE=ON \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF >&2
  cmake --build "$source/vendor/llama.cpp/build" --target llama-server --parallel "$(nproc)" >&2
fi
echo "$bin"
