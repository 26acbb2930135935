// Chooses the sizes of decode's products on the device at hand. benches/decode_tiles.py builds and runs it, and keeps what
// it prints.
//
// Method. Some layers with random weights, more than the L2 cache holds, run one after the other on one stream as they do
// in a step. One product after the other gets every size that fits, with the best found for the others, twice round;
// the least of two timings of 30 layers counts. The head is tuned by itself. Results are JSON lines, and on standard error
// all that was tried.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "layer.cuh"

namespace {

using namespace elastic;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

__global__ void fill(uint32_t* words, int64_t count, uint32_t seed, bool bf16) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    words[i] = bf16 ? (x & 0x807f807fu) | 0x3c003c00u : x;  // bf16: magnitudes of about 1/128
  }
}

template <typename T>
T* allocate(int64_t count, uint32_t seed, bool bf16) {
  void* memory = nullptr;
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  check(cudaMalloc(&memory, bytes), "allocating");
  fill<<<1024, 256>>>(static_cast<uint32_t*>(memory), bytes / 4, seed, bf16);
  return static_cast<T*>(memory);
}

template <typename T>
T* upload(const std::vector<T>& values) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, values.size() * sizeof(T)), "allocating");
  check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "copying");
  return static_cast<T*>(memory);
}

struct Shape {
  int hidden, intermediate, heads, kv_heads, dim, vocabulary, context;
  bool quantized;
};

// As decode_cuda.py's.
int attention_splits(int tokens, int kv_heads) {
  int splits = 1;
  while (splits < kMostSplits && 2 * splits * tokens * kv_heads <= 256) splits *= 2;
  return splits;
}

Weight make_weight(const Shape& s, int outputs, int contraction, uint32_t seed) {
  const int64_t size = static_cast<int64_t>(outputs) * contraction;
  Weight w = {};
  w.outputs = outputs;
  w.contraction = contraction;
  w.quantized = s.quantized;
  w.values = s.quantized ? allocate<uint8_t>(size, seed, false)
                         : reinterpret_cast<uint8_t*>(allocate<__nv_bfloat16>(size, seed, true));
  w.scales = upload(std::vector<float>(outputs, 0.02f / 74));
  return w;
}

constexpr int kLayers = 5, kPage = 64, kTimed = 6;
constexpr int64_t kScratchBytes = 256 << 20;

struct Bench {
  Shape shape;
  int tokens;
  std::vector<LayerArguments> layers;
  HeadArguments head = {};
  cudaStream_t stream;
  cudaEvent_t begin, end;

  Bench(const Shape& s, int tokens_) : shape(s), tokens(tokens_) {
    check(cudaStreamCreate(&stream), "stream");
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    const int pages = s.context / kPage + 1, width = s.heads * s.dim;
    std::vector<int> row(tokens), slot(tokens), table(tokens * pages), context(tokens, s.context);
    for (int t = 0; t < tokens; ++t) {
      row[t] = t;
      for (int p = 0; p < pages; ++p) table[t * pages + p] = t * pages + p;
      slot[t] = t * pages * kPage + s.context - 1;
    }
    LayerArguments l = {};
    const int64_t stream_size = static_cast<int64_t>(tokens) * s.hidden;
    const auto* const norm = upload(std::vector<__nv_bfloat16>(s.hidden, __nv_bfloat16(1.0f)));
    auto* const residual = allocate<__nv_bfloat16>(stream_size, 1, true);
    auto* const added = allocate<float>(16 * stream_size, 2, true);
    l.input = {residual, added, 1, norm, 1e-5f, tokens, s.hidden, nullptr};
    l.mlp_norm = norm;
    l.dim = s.dim;
    l.residual_out = residual;
    l.added_out = added;
    l.scratch = allocate<uint8_t>(kScratchBytes, 3, false);
    l.scratch_bytes = kScratchBytes;
    AttentionArguments& a = l.attention;
    a.cosine = upload(std::vector<float>(tokens * s.dim / 2, 0.6f));
    a.sine = upload(std::vector<float>(tokens * s.dim / 2, 0.8f));
    a.slot = upload(slot);
    a.row = upload(row);
    a.block_table = upload(table);
    a.context_length = upload(context);
    a.tokens = a.rows = tokens;
    a.pages = pages;
    a.page_size = kPage;
    a.slots = tokens * pages * kPage;
    a.kv_heads = s.kv_heads;
    a.splits = attention_splits(tokens, s.kv_heads);
    for (int i = 0; i < kLayers; ++i) {
      a.kv = allocate<__nv_bfloat16>(static_cast<int64_t>(a.slots) * 2 * s.kv_heads * s.dim, 10 + i, true);
      l.qkv = make_weight(s, width + 2 * s.kv_heads * s.dim, s.hidden, 20 + i);
      l.o = make_weight(s, s.hidden, width, 30 + i);
      l.gate_up = make_weight(s, 2 * s.intermediate, s.hidden, 40 + i);
      l.down = make_weight(s, s.hidden, s.intermediate, 50 + i);
      layers.push_back(l);
    }
    head.input = l.input;
    head.input.parts = 0;
    head.weight = make_weight(s, s.vocabulary, s.hidden, 60);
    head.logits = allocate<float>(static_cast<int64_t>(tokens) * s.vocabulary, 4, true);
    head.scratch = l.scratch;
    head.scratch_bytes = kScratchBytes;
  }

  // Microseconds of a layer (or of the head), or 0 where the sizes do not fit.
  float time(const Tiles (&tiles)[5], bool whole_head) {
    float least = 0;
    for (int repeat = 0; repeat < 3; ++repeat) {  // the first warms up
      check(cudaEventRecord(begin, stream), "event");
      for (int turn = 0; turn < kTimed; ++turn) {
        if (whole_head) {
          head.tiles = tiles[4];
          if (run_head(head, stream).error != cudaSuccess) return forget();
          continue;
        }
        for (LayerArguments& l : layers) {
          for (int i = 0; i < 4; ++i) l.tiles[i] = tiles[i];
          l.input.parts = tiles[3].parts;
          if (run_layer(l, stream).error != cudaSuccess) return forget();
        }
      }
      check(cudaEventRecord(end, stream), "event");
      check(cudaEventSynchronize(end), "running");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end), "event");
      const float each = ms * 1000 / (kTimed * (whole_head ? 1 : kLayers));
      if (repeat && (least == 0 || each < least)) least = each;
    }
    return least;
  }

  float forget() {
    check(cudaStreamSynchronize(stream), "running");
    cudaGetLastError();
    return 0;
  }
};

const Tiles kPackedSizes[] = {{2, 3}, {2, 4}, {2, 6}, {2, 7}, {2, 8}, {2, 12}, {4, 3}, {4, 4}, {4, 8}};
const Tiles kStreamedSizes[] = {{24, 1}, {32, 1}, {40, 1}, {64, 1}};

void tune(const Shape& shape, int tokens, bool streamed) {
  Bench bench(shape, tokens);
  Tiles best[5] = {{2, 4, 1}, {2, 4, 1}, {2, 4, 1}, {2, 4, 1}, {2, 4, 1}};
  std::vector<Tiles> sizes(std::begin(kPackedSizes), std::end(kPackedSizes));
  if (streamed) {
    sizes.assign(std::begin(kStreamedSizes), std::end(kStreamedSizes));
    for (Tiles& size : best) size = {32, 1, 1};
  } else {
    if (tokens > 2) best[3].parts = 8;
    if (tokens > 8 && !shape.quantized)
      for (Tiles& size : best) size.depth = 3;
  }
  const Weight* const weights[5] = {&bench.layers[0].qkv, &bench.layers[0].o, &bench.layers[0].gate_up,
                                    &bench.layers[0].down, &bench.head.weight};
  const char* const names[5] = {"qkv", "o", "gate_up", "down", "lm_head"};
  const int order[5] = {2, 3, 0, 1, 4};
  float times[5] = {};
  for (int round = 0; round < 2; ++round) {
    for (const int i : order) {
      Tiles tried[5];
      std::copy(best, best + 5, tried);
      float least = bench.time(tried, i == 4);
      const int64_t chunks = weights[i]->row_bytes() / kChunkBytes;
      auto attempt = [&](const Tiles& tiles) {
        tried[i] = tiles;
        const float found = bench.time(tried, i == 4);
        if (found == 0) return;
        std::fprintf(stderr, "%d %s rows %d depth %d parts %d: %.2f us\n", tokens, names[i], tiles.row_tiles, tiles.depth,
                     tiles.parts, found);
        if (least == 0 || found < least) {
          least = found;
          best[i] = tiles;
        }
      };
      for (const int parts : {1, 2, 3, 4, 5, 6, 8, 10, 13, 16}) {
        if ((i == 2 || i == 4) && parts > 1) continue;
        if (!streamed && (chunks % parts || chunks / parts < 32)) continue;
        for (const Tiles& size : sizes) {
          if (weights[i]->outputs % (kTileRows * size.row_tiles)) continue;
          attempt({size.row_tiles, size.depth, parts});
        }
      }
      times[i] = least;
    }
  }
  int64_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes += weights[i]->row_bytes() * weights[i]->outputs;
  for (int i = 0; i < 5; ++i) {
    const float us = i == 4 ? times[4] : times[order[3]];
    const int64_t read = i == 4 ? weights[4]->row_bytes() * weights[4]->outputs : bytes;
    std::printf("{\"name\": \"%s\", \"precision\": \"%s\", \"out\": %d, \"contraction\": %d, \"tokens\": %d, "
                "\"tiles\": {\"row_tiles\": %d, \"depth\": %d, \"parts\": %d}, \"microseconds\": %.2f, "
                "\"weights_tb_s\": %.3f}\n",
                names[i], shape.quantized ? "int8" : "bf16", weights[i]->outputs, weights[i]->contraction, tokens,
                best[i].row_tiles, best[i].depth, best[i].parts, us, read / us / 1e6);
  }
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 11) {
    std::fprintf(stderr,
                 "usage: tune hidden intermediate heads kv_heads dim vocabulary context int8|bf16 packed|streamed tokens\n");
    return 2;
  }
  int sizes[7];
  for (int i = 0; i < 7; ++i) sizes[i] = std::atoi(arguments[i + 1]);
  const Shape shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                       std::strcmp(arguments[8], "int8") == 0};
  tune(shape, std::atoi(arguments[10]), std::strcmp(arguments[9], "streamed") == 0);
  return 0;
}
