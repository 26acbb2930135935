#!/usr/bin/env bash
# Builds libelastic_decode.so beside this script, for compute capabilities 8.0, 8.9 and 9.0. It needs nvcc of CUDA 13 and
# JAX (for XLA's FFI headers), and no GPU. The library is committed, so that users need neither.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
include="$("${PYTHON:-python3}" -c 'import jax.ffi; print(jax.ffi.include_dir())')"
archs=()
for capability in ${CAPABILITIES:-80 89 90}; do
  archs+=(-gencode "arch=compute_${capability},code=sm_${capability}")
done
# The runtime is linked statically: its only partner at run time is the driver.
nvcc -O3 -std=c++17 "${archs[@]}" -I"$include" -shared -Xcompiler -fPIC,-fvisibility=hidden,-ffile-prefix-map="$PWD"=. \
  --diag-suppress 940,2473 -cudart static -Xlinker --strip-all "$@" -o libelastic_decode.so decode.cu
