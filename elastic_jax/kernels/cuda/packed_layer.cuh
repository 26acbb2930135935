// A layer, and the language-model head, of products that keep packed activations in shared memory (products.cuh).
//
// A layer of one or two tokens is five launches: qkv, attention, o, gate_up, down; its products normalize and pack
// activations for themselves. Of more tokens it is nine: norm before qkv and gate_up, and packing before o and down, are
// kernels of their own, since every block would do the same.

#pragma once

#include <algorithm>

#include "activations.cuh"
#include "launch.cuh"
#include "products.cuh"

namespace elastic {

template <typename Weight, int kMTiles, int kRowTiles, int kDepth, bool kSwiGlu, Input kInput, int kTokens>
cudaError_t launch_product(const ProductArguments& a, cudaStream_t stream, int* blocks) {
  auto* const kernel = &product<Weight, kMTiles, kRowTiles, kDepth, kSwiGlu, kInput, kTokens>;
  static const cudaError_t allowed = allow_shared_memory(kernel);
  if (allowed != cudaSuccess) return allowed;
  const int tiles = a.outputs / (kTileRows * kRowTiles);
  const int walkers = std::min(tiles, std::max(1, device().multiprocessors / a.parts));
  *blocks = walkers * a.parts;
  // Started early, two blocks could share a multiprocessor and leave another idle: more than half of its memory each
  // keeps them apart.
  const int shared = std::max(product_shared_bytes<Weight, kMTiles, kRowTiles, kDepth>(a.tokens, a.row_bytes, a.parts),
                              device().shared / 2 + 1024);
  return launch(kernel, dim3(*blocks), 32 * kWarpsFor<kMTiles>, shared, stream, a);
}

// Tokens up to which products normalize and pack for themselves, and save launches.
constexpr int kPackedInProduct = 2;

template <typename Weight, int kMTiles, int kRowTiles, int kDepth, bool kSwiGlu>
cudaError_t choose_input(const ProductArguments& a, cudaStream_t stream, int* blocks) {
  constexpr Input kPacked = Input::kPacked, kRows = Input::kRows, kResidual = Input::kResidual;
  if (a.input == kPacked) return launch_product<Weight, kMTiles, kRowTiles, kDepth, kSwiGlu, kPacked, 0>(a, stream, blocks);
  if constexpr (kMTiles == 1) {
    static_assert(kPackedInProduct == 2);
    if constexpr (!kSwiGlu) {
      if (a.input == kRows && a.tokens == 1)
        return launch_product<Weight, 1, kRowTiles, kDepth, false, kRows, 1>(a, stream, blocks);
      if (a.input == kRows && a.tokens == 2)
        return launch_product<Weight, 1, kRowTiles, kDepth, false, kRows, 2>(a, stream, blocks);
    }
    if (a.input == kResidual && a.tokens == 1)
      return launch_product<Weight, 1, kRowTiles, kDepth, kSwiGlu, kResidual, 1>(a, stream, blocks);
    if (a.input == kResidual && a.tokens == 2)
      return launch_product<Weight, 1, kRowTiles, kDepth, kSwiGlu, kResidual, 2>(a, stream, blocks);
  }
  return cudaErrorInvalidValue;
}

// The sizes that kernels are built for; decode_cuda.py has the same list.
template <typename Weight, int kMTiles, bool kSwiGlu>
cudaError_t choose_product(const ProductArguments& a, const Tiles& tiles, cudaStream_t stream, int* blocks) {
  const int key = 100 * tiles.row_tiles + tiles.depth;
  if (key == 204) return choose_input<Weight, kMTiles, 2, 4, kSwiGlu>(a, stream, blocks);
  if (key == 206) return choose_input<Weight, kMTiles, 2, 6, kSwiGlu>(a, stream, blocks);
  if (key == 208) return choose_input<Weight, kMTiles, 2, 8, kSwiGlu>(a, stream, blocks);
  if (key == 403) return choose_input<Weight, kMTiles, 4, 3, kSwiGlu>(a, stream, blocks);
  if (key == 404) return choose_input<Weight, kMTiles, 4, 4, kSwiGlu>(a, stream, blocks);
  if constexpr (kMTiles == 1) {
    if (key == 203) return choose_input<Weight, 1, 2, 3, kSwiGlu>(a, stream, blocks);
  } else {
    if (key == 207) return choose_input<Weight, kMTiles, 2, 7, kSwiGlu>(a, stream, blocks);
    if (key == 212) return choose_input<Weight, kMTiles, 2, 12, kSwiGlu>(a, stream, blocks);
    if (key == 408) return choose_input<Weight, kMTiles, 4, 8, kSwiGlu>(a, stream, blocks);
  }
  return cudaErrorInvalidValue;
}

template <bool kSwiGlu>
cudaError_t run_product(bool quantized, const ProductArguments& a, const Tiles& tiles, cudaStream_t stream,
                        int* blocks) {
  if (!quantized) return choose_product<Bf16, 1, kSwiGlu>(a, tiles, stream, blocks);
  if (a.tokens <= 8) return choose_product<Int8, 1, kSwiGlu>(a, tiles, stream, blocks);
  return choose_product<Int8, 2, kSwiGlu>(a, tiles, stream, blocks);
}

inline cudaError_t run_norm(bool quantized, const NormArguments& a, cudaStream_t stream) {
  auto* const kernel = quantized ? &norm<Int8> : &norm<Bf16>;
  static const cudaError_t allowed[2] = {allow_shared_memory(&norm<Bf16>), allow_shared_memory(&norm<Int8>)};
  if (allowed[quantized] != cudaSuccess) return allowed[quantized];
  return launch(kernel, dim3(a.input.tokens), kNormThreads, 0, stream, a);
}

inline cudaError_t run_pack(bool quantized, const PackArguments& a, cudaStream_t stream) {
  auto* const kernel = quantized ? &pack_rows<Int8> : &pack_rows<Bf16>;
  static const cudaError_t allowed[2] = {allow_shared_memory(&pack_rows<Bf16>), allow_shared_memory(&pack_rows<Int8>)};
  if (allowed[quantized] != cudaSuccess) return allowed[quantized];
  const dim3 grid((a.contraction + kPackPiece - 1) / kPackPiece, a.tokens);
  return launch(kernel, grid, kPackThreads, 0, stream, a);
}

inline ProductArguments product_of(const Weight& weight, int tokens, const Tiles& tiles, float* out) {
  ProductArguments a = {};
  a.weight = weight.values;
  a.weight_scales = weight.scales;
  a.outputs = weight.outputs;
  a.row_bytes = weight.row_bytes();
  a.tokens = tokens;
  a.parts = tiles.parts;
  a.out = out;
  return a;
}

// Normalizes what a product takes, in the product or before it.
inline cudaError_t give_normalized(const Weight& weight, ProductArguments& p, const NormInput& input, uint8_t* packed,
                                   float* token_scales, cudaStream_t stream) {
  if (input.tokens <= kPackedInProduct && input.hidden <= kNormVectors * 4 * 32 * kWarpsFor<1>) {
    p.input = Input::kResidual;
    p.norm = input;
    return cudaSuccess;
  }
  p.input = Input::kPacked;
  p.packed = packed;
  p.token_scales = token_scales;
  return run_norm(weight.quantized, {input, packed, token_scales}, stream);
}

// Gives a product float32 rows with the maxima of their magnitudes.
inline cudaError_t give_rows(const Weight& weight, ProductArguments& p, const float* rows, const float* maxima, int count,
                             uint8_t* packed, float* token_scales, cudaStream_t stream) {
  if (p.tokens <= kPackedInProduct) {
    p.input = Input::kRows;
    p.rows = rows;
    p.maxima = maxima;
    p.maxima_count = count;
    return cudaSuccess;
  }
  p.input = Input::kPacked;
  p.packed = packed;
  p.token_scales = token_scales;
  return run_pack(weight.quantized, {rows, maxima, count, p.tokens, weight.contraction, packed, token_scales}, stream);
}

inline Status run_packed_layer(LayerArguments l, cudaStream_t stream) {
  const int tokens = l.input.tokens, hidden = l.input.hidden;
  const int kv_heads = l.attention.kv_heads, heads = l.o.contraction / l.dim, splits = l.attention.splits;
  const int intermediate = l.down.contraction, width = heads * l.dim;

  Scratch scratch(l.scratch, l.scratch_bytes);
  auto* const middle = scratch.take<__nv_bfloat16>(static_cast<int64_t>(tokens) * hidden);
  auto* const packed = scratch.take<uint8_t>(2 * padded_tokens(tokens) * std::max({hidden, width, intermediate}));
  auto* const token_scales = scratch.take<float>(tokens);
  auto* const projected = scratch.take<float>(static_cast<int64_t>(l.tiles[0].parts) * tokens * l.qkv.outputs);
  auto* const partial = scratch.take<float>(static_cast<int64_t>(tokens) * splits * width);
  auto* const state = scratch.take<float>(static_cast<int64_t>(tokens) * splits * heads * 2);
  auto* const attended = scratch.take<float>(static_cast<int64_t>(tokens) * width);
  auto* const attended_maxima = scratch.take<float>(kv_heads * tokens);
  auto* const ended = scratch.take<uint32_t>(kv_heads * tokens);
  auto* const o_out = scratch.take<float>(static_cast<int64_t>(l.tiles[1].parts) * tokens * hidden);
  auto* const activated = scratch.take<float>(static_cast<int64_t>(tokens) * intermediate);
  auto* const activated_maxima = scratch.take<float>(static_cast<int64_t>(device().multiprocessors) * tokens);
  if (scratch.exceeded()) return Status{cudaErrorMemoryAllocation, "scratch memory"};

  int blocks = 0;
  ProductArguments p = product_of(l.qkv, tokens, l.tiles[0], projected);
  NormInput n = l.input;
  n.out = middle;
  p.counters = ended;
  p.counters_count = kv_heads * tokens;
  ELASTIC_RUN(give_normalized(l.qkv, p, n, packed, token_scales, stream), "norm before attention");
  ELASTIC_RUN(run_product<false>(l.qkv.quantized, p, l.tiles[0], stream, &blocks), "qkv");

  AttentionArguments a = l.attention;
  a.qkv = projected;
  a.parts = l.tiles[0].parts;
  a.partial = partial;
  a.state = state;
  a.out = attended;
  a.maxima = attended_maxima;
  a.ended = ended;
  a.clusters = device().hopper;
  ELASTIC_RUN(run_attention(l.dim, heads / kv_heads, a, stream), "attention");

  p = product_of(l.o, tokens, l.tiles[1], o_out);
  ELASTIC_RUN(give_rows(l.o, p, attended, attended_maxima, kv_heads, packed, token_scales, stream), "packing for o");
  ELASTIC_RUN(run_product<false>(l.o.quantized, p, l.tiles[1], stream, &blocks), "o");

  p = product_of(l.gate_up, tokens, l.tiles[2], activated);
  n.residual = middle;
  n.added = o_out;
  n.parts = l.tiles[1].parts;
  n.weight = l.mlp_norm;
  n.out = l.residual_out;
  p.out_maxima = activated_maxima;
  ELASTIC_RUN(give_normalized(l.gate_up, p, n, packed, token_scales, stream), "norm before the MLP");
  ELASTIC_RUN(run_product<true>(l.gate_up.quantized, p, l.tiles[2], stream, &blocks), "gate_up");

  p = product_of(l.down, tokens, l.tiles[3], l.added_out);
  ELASTIC_RUN(give_rows(l.down, p, activated, activated_maxima, blocks, packed, token_scales, stream), "packing for down");
  ELASTIC_RUN(run_product<false>(l.down.quantized, p, l.tiles[3], stream, &blocks), "down");
  return {};
}

inline Status run_packed_head(HeadArguments h, cudaStream_t stream) {
  Scratch scratch(h.scratch, h.scratch_bytes);
  const int64_t size = static_cast<int64_t>(h.input.tokens) * h.input.hidden;
  h.input.out = scratch.take<__nv_bfloat16>(size);
  auto* const packed = scratch.take<uint8_t>(2 * padded_tokens(h.input.tokens) * h.input.hidden);
  auto* const token_scales = scratch.take<float>(h.input.tokens);
  if (scratch.exceeded()) return Status{cudaErrorMemoryAllocation, "scratch memory"};
  ProductArguments p = product_of(h.weight, h.input.tokens, h.tiles, h.logits);
  int blocks = 0;
  ELASTIC_RUN(give_normalized(h.weight, p, h.input, packed, token_scales, stream), "norm before the head");
  ELASTIC_RUN(run_product<false>(h.weight.quantized, p, h.tiles, stream, &blocks), "head");
  return {};
}

}  // namespace elastic
