#!/usr/bin/env bash
# Builds libelastic_decode.so beside this script, for compute capabilities 8.0, 8.9 and 9.0. It needs nvcc of CUDA 13 and
# JAX (for XLA's FFI headers; PYTHON names an interpreter that has it), and no GPU. The library is committed, so that
# users need none of them; a test compares the digest of the sources that it was built from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
include="$("${PYTHON:-python3}" -c 'import jax.ffi; print(jax.ffi.include_dir())')"
sources="$(cat decode.cu layer.cuh activations.cuh attention.cuh products.cuh packing.cuh | sha256sum | cut -d' ' -f1)"
archs=()
for capability in ${CAPABILITIES:-80 89 90}; do
  archs+=(-gencode "arch=compute_${capability},code=sm_${capability}")
done
# The runtime is linked statically: the library's only partner at run time is the driver. The warnings are of XLA's headers.
nvcc -O3 -std=c++17 "${archs[@]}" -I"$include" -DELASTIC_SOURCES="\"$sources\"" -shared \
  -Xcompiler -fPIC,-fvisibility=hidden,-w,-ffile-prefix-map="$PWD"=. --diag-suppress 940,2473 --compress-mode=size \
  -cudart static -Xlinker --strip-all "$@" -o libelastic_decode.so decode.cu
