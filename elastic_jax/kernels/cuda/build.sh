#!/usr/bin/env bash
# Builds the libraries beside this script: libelastic_decode.so for compute capabilities 8.0, 8.9 and 9.0a (those named by
# CAPABILITIES), libelastic_sampling.so for those and 10.0 and 12.0, and libelastic_prompt.so for 9.0a alone, which is 9.0 with
# instructions that later GPUs do not have. It needs nvcc
# of CUDA 13 and JAX (for XLA's FFI headers; PYTHON names an interpreter that has it), and no GPU. The libraries are
# committed, so that users need none of them; tests compare the digests of the sources that they were built from.
# Arguments go to nvcc.
#
# ONLY names those to build: "decode sampling prompt".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
include="$("${PYTHON:-python3}" -c 'import jax.ffi; print(jax.ffi.include_dir())')"

# build LIBRARY CAPABILITIES SOURCE OTHER_SOURCES -- NVCC_OPTIONS
build() {
  local library="$1" archs=() capability files=() sources
  for capability in $2; do
    archs+=(-gencode "arch=compute_${capability},code=sm_${capability}")
  done
  shift 2
  while [[ "$1" != -- ]]; do
    files+=("$1")
    shift
  done
  shift
  sources="$(cat "${files[@]}" | sha256sum | cut -d' ' -f1)"
  # The runtime is linked statically: a library's only partner at run time is the driver. The warnings are of XLA's headers.
  nvcc -O3 -std=c++17 "${archs[@]}" -I"$include" -DELASTIC_SOURCES="\"$sources\"" -shared \
    -Xcompiler -fPIC,-fvisibility=hidden,-w,-ffile-prefix-map="$PWD"=.,-ffile-prefix-map="$include"=xla --diag-suppress 940,2473 --compress-mode=size \
    -cudart static -Xlinker --strip-all "$@" -o "$library" "${files[0]}"
}

for name in ${ONLY:-decode sampling prompt}; do
  case "$name" in
    decode) build libelastic_decode.so "${CAPABILITIES:-80 89 90a}" decode.cu layer.cuh packed_layer.cuh streamed_layer.cuh \
      launch.cuh activations.cuh attention.cuh products.cuh streamed.cuh packing.cuh instructions.cuh \
      hopper.cuh -- "$@" ;;
    sampling) build libelastic_sampling.so "${CAPABILITIES:-80 89 90 100 120}" sampling.cu sampling.cuh -- "$@" ;;
    prompt) build libelastic_prompt.so 90a prompt.cu prompt_dot.cuh prompt_attention.cuh hopper.cuh -- "$@" ;;
    *) echo "no library is called $name; there are: decode sampling prompt" >&2 && exit 2 ;;
  esac
done
