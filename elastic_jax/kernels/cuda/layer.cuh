// Launches the kernels of one decoder layer, or of the language-model head, on a stream.
//
// On Hopper each may start before its predecessor ends (programmatic dependent launch). A layer's last product is left
// unadded: what normalizes next adds it, so that splitting a contraction costs no launch.

#pragma once

#include "packed_layer.cuh"
#include "streamed_layer.cuh"

namespace elastic {

inline int most_tokens(const Tiles& tiles) { return tiles.streamed() ? kMostStreamed : kMostPacked; }

inline Status run_layer(const LayerArguments& l, cudaStream_t stream) {
  return l.tiles[0].streamed() ? run_streamed_layer(l, stream) : run_packed_layer(l, stream);
}

inline Status run_head(const HeadArguments& h, cudaStream_t stream) {
  return h.tiles.streamed() ? run_streamed_head(h, stream) : run_packed_head(h, stream);
}

}  // namespace elastic
