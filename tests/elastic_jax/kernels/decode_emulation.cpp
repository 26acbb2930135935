// decode.cu on a CPU, for test_decode_cuda.py, which builds and calls it: layers of packed products as on an A100, and of
// streamed ones as on an H100. `cuda_on_cpu` stands in for CUDA's headers; here is what needs a GPU's instructions.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <functional>

namespace elastic {

inline void release_successor() {}
inline void wait_for_predecessor() {}
inline void wait_for_cluster() { __syncthreads(); }  // a launch of more than one block a cluster is refused
inline float load_of_cluster(const float* mine, int) { return *mine; }

// What is copied and fetched comes as late as it may in one order, so that what is read without waiting for it is not
// there; and at once in the other, so that what is written over while it is still read is gone.
inline bool at_once() { return emulation::descending; }

struct Copy {
  void* to;
  const void* from;
};
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
thread_local std::vector<Copies> copies;  // of the block's threads

inline Copies& mine() {
  const size_t at = emulation::block->now;
  if (copies.size() <= at) copies.resize(at + 1);
  return copies[at];
}

inline void copy_async(void* to, const void* from) {
  if (at_once()) std::memcpy(to, from, 16);
  else mine().open.push_back({to, from});
}

inline void commit_copies() {
  mine().groups.push_back(std::move(mine().open));
  mine().open.clear();
}

template <int kPending>
inline void await_copies() {
  auto& groups = mine().groups;
  while (groups.size() > kPending) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

inline void prefetch(const void* at) { [[maybe_unused]] const volatile char read = *static_cast<const char*>(at); }

struct Operands {
  uint32_t x[4], w[2];
};

// One lane's sums: of row lane / 4 and of the one 8 below, columns 2 * (lane % 4) and the next. Four lanes hold a row, in
// two words each: the first words have its first half. `number(word, i)` is number i of a word.
template <typename Sum, int kNumbers, typename Number>
void multiply_lanes(Sum (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1, const Number& number) {
  Operands all[emulation::kWarp];
  emulation::shown(Operands{{x[0], x[1], x[2], x[3]}, {w0, w1}}, all);
  constexpr int kInWord = kNumbers / 8;
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, below = i / 2, column = 2 * (lane % 4) + i % 2;
    Sum added = sum[i];
    for (int k = 0; k < kNumbers; ++k) {
      const int half = k / (4 * kInWord), quarter = k / kInWord % 4, inside = k % kInWord;
      added += number(all[row * 4 + quarter].x[2 * half + below], inside) * number(all[column * 4 + quarter].w[half], inside);
    }
    sum[i] = added;
  }
}

inline void multiply_operands(int32_t (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
  multiply_lanes<int32_t, 32>(sum, x, w0, w1, [](uint32_t word, int i) {
    return static_cast<int32_t>(static_cast<int8_t>(word >> 8 * i & 255));
  });
}

inline void multiply_operands(float (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
  multiply_lanes<float, 16>(sum, x, w0, w1, [](uint32_t word, int i) {
    return __uint_as_float(i ? word & 0xffff0000u : word << 16);
  });
}

inline uint32_t transposed(uint32_t pair) {
  uint32_t all[emulation::kWarp];
  emulation::shown(pair, all);
  const int row = emulation::lane() / 4, column = 2 * (emulation::lane() % 4);
  auto number = [&](int r, int c) { return all[r * 4 + c / 2] >> 16 * (c % 2) & 0xffffu; };
  return number(column, row) | number(column + 1, row) << 16;
}

// -- Hopper -----------------------------------------------------------------------------------------------------------

// A barrier in its 64 bits. A phase ends when all have arrived and all bytes are there.
struct Phase {
  int32_t bytes;
  uint8_t arrivals, missing, parity, unused;

  void end() {
    if (missing > 0 || bytes > 0) return;
    missing = arrivals;
    parity ^= 1;
  }
};

inline Phase& phase_of(uint64_t* barrier) {
  static_assert(sizeof(Phase) == sizeof(uint64_t));
  return *reinterpret_cast<Phase*>(barrier);
}

inline void init_barrier(uint64_t* barrier, int arrivals) {
  phase_of(barrier) = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
}

inline void fence_barriers() {}

inline void arrive_expecting(uint64_t* barrier, int bytes) {
  Phase& phase = phase_of(barrier);
  phase.bytes += bytes;
  --phase.missing;
  phase.end();
}

inline void arrive(uint64_t* barrier) { arrive_expecting(barrier, 0); }

// Late ones arrive when somebody waits in vain, in the order in which they were asked for.
thread_local std::deque<std::function<void()>> fetches;

template <typename Deliver>
void ask(const Deliver& deliver) {
  if (at_once()) deliver();
  else fetches.push_back(deliver);
}

inline void wait(uint64_t* barrier, uint32_t parity) {
  emulation::block->poll([&] {
    while (phase_of(barrier).parity == parity && !fetches.empty()) {
      fetches.front()();
      fetches.pop_front();
    }
    return phase_of(barrier).parity != parity;
  });
}

template <int kThreads>
inline void wait_for_threads() {
  emulation::block->some.members = kThreads;
  emulation::block->wait(emulation::block->some);
}

inline void arrived(uint64_t* barrier, int bytes) {
  phase_of(barrier).bytes -= bytes;
  phase_of(barrier).end();
}

// Pieces of 16 bytes are exchanged by bits of the row, which are of the address where rows have 128 bytes.
inline size_t swizzled(size_t at) { return at ^ (at >> 7 & 7) << 4; }

template <bool kOnce>
inline void fetch(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  ask([=] {
    const size_t first = __cvta_generic_to_shared(to);
    for (int r = 0; r < map->high; ++r)
      for (int c = 0; c < map->wide; ++c) {
        const bool inside = row + r < map->rows && column + c < map->columns;
        shared[swizzled(first + r * map->wide + c)] = inside ? map->at[(row + r) * map->apart + column + c] : 0;
      }
    arrived(barrier, map->high * map->wide);
  });
}

inline void fetch_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  ask([=] {
    std::memcpy(to, from, bytes);
    arrived(barrier, bytes);
  });
}

template <int kRegisters>
inline void take_registers() {}
template <int kRegisters>
inline void leave_registers() {}
inline void begin_products() {}
inline void commit_products() {}
template <int kUnfinished>
inline void wait_products() {
  __syncwarp();  // of whole warps, and products are done where they begin
}
template <typename T, int kCount>
inline void pin(T (&)[kCount]) {}

// Of 64 rows and twice as many others as there are sums, 32 bytes of each, one thread's.
template <typename Sum, int kSums>
inline void multiply_tiles(Sum (&sums)[kSums], uint64_t left, uint64_t right, int add) {
  using Number = std::conditional_t<std::is_same_v<Sum, int32_t>, int8_t, uint16_t>;
  auto number = [](uint64_t operand, int row, int k) {
    Number found;
    std::memcpy(&found, shared + swizzled(((operand & 0x3fff) << 4) + 128 * row + k * sizeof(Number)), sizeof found);
    if constexpr (sizeof(Number) == 1) return static_cast<int32_t>(found);
    else return __uint_as_float(static_cast<uint32_t>(found) << 16);
  };
  const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
  for (int i = 0; i < kSums; ++i) {
    const int below = i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    if (!add) sums[i] = 0;
    for (int k = 0; k < 32 / static_cast<int>(sizeof(Number)); ++k)
      sums[i] += number(left, row + below, k) * number(right, column, k);
  }
}

}  // namespace elastic

void emulation::forget_copies() {
  for (auto& each : elastic::copies) each = {};
  elastic::fetches.clear();
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, int, cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#define __CUDA_ARCH_FEAT_SM90_ALL
#define unaligned shared  // there is one array
#define ELASTIC_SOURCES ""
#include "decode.cu"

#pragma GCC visibility push(default)

extern "C" void set_descending(bool descending) { emulation::descending = descending; }

// Before the first launch.
extern "C" void set_generation(int generation) { emulation::generation = generation; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmulatedLayer,
                              ([](auto... arguments) { return elastic::decode_layer(nullptr, arguments...); }),
                              ffi::Ffi::Bind()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<float>("eps")
                                  .Attr<int32_t>("page_size")
                                  .Attr<int32_t>("splits")
                                  .Attr<ffi::Span<const int32_t>>("tiles"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmulatedHead,
                              ([](auto... arguments) { return elastic::decode_head(nullptr, arguments...); }),
                              ffi::Ffi::Bind()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>()
                                  .Attr<float>("eps")
                                  .Attr<ffi::Span<const int32_t>>("tiles"));

#pragma GCC visibility pop
