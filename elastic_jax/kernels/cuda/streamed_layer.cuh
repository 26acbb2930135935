// A layer, and the language-model head, of products through which both operands stream (streamed.cuh).
//
// A layer is seven launches: norm, qkv, attention, o, norm, gate_up, down. What is rounded for a product is rounded by
// the kernel that makes it.

#pragma once

#include "launch.cuh"
#include "streamed.cuh"

namespace elastic {

template <typename Weight, int kTiles, int kPadded, bool kSwiGlu>
cudaError_t launch_streamed(const StreamedArguments& a, cudaStream_t stream) {
  auto* const kernel = &streamed_product<Weight, kTiles, kPadded, kSwiGlu>;
  static const cudaError_t allowed = allow_shared_memory(kernel);
  if (allowed != cudaSuccess) return allowed;
  const int groups = a.outputs / (kTiles * kStreamedRows);
  const int blocks = std::min(groups, std::max(1, device().multiprocessors / a.parts)) * a.parts;
  return launch(kernel, dim3(blocks), Stream<Weight, kTiles, kPadded>::kThreads, Stream<Weight, kTiles, kPadded>::kBytes, stream, a);
}

// The sizes that kernels are built for; decode_cuda.py has the same list.
template <typename Weight, int kPadded, bool kSwiGlu>
cudaError_t choose_streamed(const StreamedArguments& a, int row_tiles, cudaStream_t stream) {
  if (row_tiles == 32) return launch_streamed<Weight, 4, kPadded, kSwiGlu>(a, stream);
  if constexpr (kPadded <= 16) {
    if (row_tiles == 64) return launch_streamed<Weight, 8, kPadded, kSwiGlu>(a, stream);
  }
  if constexpr (!kSwiGlu) {
    if (row_tiles == 24) return launch_streamed<Weight, 3, kPadded, kSwiGlu>(a, stream);
    if constexpr (kPadded <= 32) {
      if (row_tiles == 40) return launch_streamed<Weight, 5, kPadded, kSwiGlu>(a, stream);
    }
  }
  return cudaErrorInvalidValue;
}

template <typename Weight, bool kSwiGlu>
cudaError_t choose_padded(const StreamedArguments& a, int row_tiles, int padded, cudaStream_t stream) {
  if (padded == 8) return choose_streamed<Weight, 8, kSwiGlu>(a, row_tiles, stream);
  if (padded == 16) return choose_streamed<Weight, 16, kSwiGlu>(a, row_tiles, stream);
  if (padded == 32) return choose_streamed<Weight, 32, kSwiGlu>(a, row_tiles, stream);
  return choose_streamed<Weight, 64, kSwiGlu>(a, row_tiles, stream);
}

template <bool kSwiGlu>
cudaError_t run_streamed(const Weight& weight, const Tiles& tiles, const Rows& rows, StreamedArguments a,
                         cudaStream_t stream) {
  const int planes = weight.quantized ? 2 : 1;
  if (!device().streams || weight.outputs % (8 * tiles.row_tiles) || weight.row_bytes() % kOperandBytes ||
      weight.contraction % kScaled)
    return cudaErrorInvalidValue;
  cudaError_t error = describe_matrix(&a.weight, weight.values, weight.outputs, weight.row_bytes(), kStreamedRows);
  if (error == cudaSuccess)
    error = describe_matrix(&a.activations, rows.values, rows.padded * planes, rows.bytes, rows.padded * planes);
  if (error != cudaSuccess) return error;
  a.weight_scales = weight.scales;
  a.row_scales = rows.scales;
  a.outputs = weight.outputs;
  a.steps = static_cast<int>(weight.row_bytes() / kOperandBytes);
  a.parts = tiles.parts;
  if (weight.quantized) return choose_padded<Int8, kSwiGlu>(a, tiles.row_tiles, rows.padded, stream);
  return choose_padded<Bf16, kSwiGlu>(a, tiles.row_tiles, rows.padded, stream);
}

inline cudaError_t run_streamed_norm(const StreamedNormArguments& a, cudaStream_t stream) {
  constexpr int kEach = kStreamedNormThreads / 32 * kScaled;
  static const cudaError_t allowed = allow_shared_memory(&streamed_norm);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid((a.input.hidden + kEach - 1) / kEach, a.input.tokens);
  return launch(&streamed_norm, grid, kStreamedNormThreads, 0, stream, a);
}

// Memory for the activations of a weight's products, of which there is one at a time.
struct RowsMemory {
  int padded;
  uint8_t* values;
  float* scales;

  RowsMemory(Scratch& scratch, int tokens, int most)
      : padded(streamed_tokens(tokens)),
        values(scratch.take<uint8_t>(2 * static_cast<int64_t>(padded) * most)),
        scales(scratch.take<float>(static_cast<int64_t>(padded) * (most / kScaled))) {}

  Rows of(const Weight& weight) const { return {values, scales, weight.row_bytes(), padded, weight.quantized}; }
};

inline Status run_streamed_layer(const LayerArguments& l, cudaStream_t stream) {
  const int tokens = l.input.tokens, hidden = l.input.hidden;
  const int kv_heads = l.attention.kv_heads, heads = l.o.contraction / l.dim, splits = l.attention.splits;
  const int width = heads * l.dim;

  Scratch scratch(l.scratch, l.scratch_bytes);
  auto* const middle = scratch.take<__nv_bfloat16>(static_cast<int64_t>(tokens) * hidden);
  const RowsMemory narrow(scratch, tokens, std::max(hidden, width));
  const RowsMemory wide(scratch, tokens, l.down.contraction);  // gate_up reads the narrow ones while it writes these
  auto* const squares = scratch.take<float>(static_cast<int64_t>(tokens) * (hidden / kScaled));
  auto* const projected = scratch.take<float>(static_cast<int64_t>(l.tiles[0].parts) * tokens * l.qkv.outputs);
  auto* const partial = scratch.take<float>(static_cast<int64_t>(tokens) * splits * width);
  auto* const state = scratch.take<float>(static_cast<int64_t>(tokens) * splits * heads * 2);
  auto* const ended = scratch.take<uint32_t>(kv_heads * tokens);
  auto* const o_out = scratch.take<float>(static_cast<int64_t>(l.tiles[1].parts) * tokens * hidden);
  if (scratch.exceeded()) return Status{cudaErrorMemoryAllocation, "scratch memory"};
  if (l.dim * (heads / kv_heads) % kScaled) return Status{cudaErrorInvalidValue, "heads"};

  StreamedArguments normalized = {};
  normalized.tokens = tokens;
  normalized.squares = squares;
  normalized.hidden = hidden;
  normalized.eps = l.input.eps;
  StreamedArguments plain = {};
  plain.tokens = tokens;

  NormInput n = l.input;
  n.out = middle;
  ELASTIC_RUN(run_streamed_norm({n, narrow.of(l.qkv), squares}, stream), "norm before attention");
  StreamedArguments p = normalized;
  p.out = projected;
  p.counters = ended;
  p.counters_count = kv_heads * tokens;
  ELASTIC_RUN(run_streamed<false>(l.qkv, l.tiles[0], narrow.of(l.qkv), p, stream), "qkv");

  AttentionArguments a = l.attention;
  a.qkv = projected;
  a.parts = l.tiles[0].parts;
  a.partial = partial;
  a.state = state;
  a.ended = ended;
  a.into = narrow.of(l.o);
  a.clusters = splits <= 2;  // larger ones wait long for neighbouring multiprocessors
  ELASTIC_RUN(run_attention(l.dim, heads / kv_heads, a, stream), "attention");

  p = plain;
  p.out = o_out;
  ELASTIC_RUN(run_streamed<false>(l.o, l.tiles[1], narrow.of(l.o), p, stream), "o");

  n.residual = middle;
  n.added = o_out;
  n.parts = l.tiles[1].parts;
  n.weight = l.mlp_norm;
  n.out = l.residual_out;
  ELASTIC_RUN(run_streamed_norm({n, narrow.of(l.gate_up), squares}, stream), "norm before the MLP");
  p = normalized;
  p.activated = wide.of(l.down);
  ELASTIC_RUN(run_streamed<true>(l.gate_up, l.tiles[2], narrow.of(l.gate_up), p, stream), "gate_up");

  p = plain;
  p.out = l.added_out;
  ELASTIC_RUN(run_streamed<false>(l.down, l.tiles[3], wide.of(l.down), p, stream), "down");
  return {};
}

inline Status run_streamed_head(HeadArguments h, cudaStream_t stream) {
  Scratch scratch(h.scratch, h.scratch_bytes);
  h.input.out = scratch.take<__nv_bfloat16>(static_cast<int64_t>(h.input.tokens) * h.input.hidden);
  const RowsMemory rows(scratch, h.input.tokens, h.input.hidden);
  auto* const squares = scratch.take<float>(static_cast<int64_t>(h.input.tokens) * (h.input.hidden / kScaled));
  if (scratch.exceeded()) return Status{cudaErrorMemoryAllocation, "scratch memory"};
  ELASTIC_RUN(run_streamed_norm({h.input, rows.of(h.weight), squares}, stream), "norm before the head");
  StreamedArguments p = {};
  p.tokens = h.input.tokens;
  p.squares = squares;
  p.hidden = h.input.hidden;
  p.eps = h.input.eps;
  p.out = h.logits;
  ELASTIC_RUN(run_streamed<false>(h.weight, h.tiles, rows.of(h.weight), p, stream), "head");
  return {};
}

}  // namespace elastic
