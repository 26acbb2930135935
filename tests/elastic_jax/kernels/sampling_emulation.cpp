// sampling.cuh on a CPU, for test_sampling_cuda.py, which builds and calls it. Threads are contexts that take turns: one
// runs until it waits, in ascending or descending order, so a wait that is missing shows as a difference between the two.

#include <ucontext.h>

#include <memory>
#include <type_traits>
#include <vector>

#include "sampling.cuh"

using namespace elastic;

namespace {

constexpr size_t kStack = 64 << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int waits_of_block = 0, waits_of_row = 0;  // waits that it has arrived at
  bool done = false;
};

struct Row;

struct HostTeam {
  static constexpr int kThreads = ELASTIC_THREADS;
  Row* row;
  int thread_, block_;

  int thread() const { return thread_; }
  int block() const { return block_; }
  int blocks() const;
  void sync();
  void sync_row();

  template <typename T>
  static T add(T* to, std::type_identity_t<T> value) {
    const T before = *to;
    *to += value;
    return before;
  }
  template <typename T>
  static void most(T* to, std::type_identity_t<T> value) {
    if (value > *to) *to = value;
  }
  template <typename T>
  static T load(const T* from) {
    return *from;
  }
};

struct Row {
  const ChoiceArguments* arguments;
  int output, blocks;
  std::vector<Thread> threads;
  std::vector<ChoiceShared<HostTeam::kThreads>> shared;
  ucontext_t scheduler;

  Row(const ChoiceArguments* a, int output_, int blocks_)
      : arguments(a), output(output_), blocks(blocks_), threads(blocks_ * HostTeam::kThreads), shared(blocks_) {
    memset(static_cast<void*>(shared.data()), 0xa5, shared.size() * sizeof(shared[0]));  // it is not zeros on a GPU
  }

  static void enter(unsigned high, unsigned low, int at) {
    Row* const row = reinterpret_cast<Row*>(static_cast<uintptr_t>(high) << 32 | low);
    HostTeam team = {row, at % HostTeam::kThreads, at / HostTeam::kThreads};
    choose_row(team, row->shared[team.block_], *row->arguments, row->output);
    row->threads[at].done = true;
    swapcontext(&row->threads[at].context, &row->scheduler);
  }

  void wait(int at) { swapcontext(&threads[at].context, &scheduler); }

  // Whether everybody whom a thread waits for has arrived where it has.
  bool may_run(int at) const {
    const Thread& mine = threads[at];
    const int first = at / HostTeam::kThreads * HostTeam::kThreads;
    for (int i = 0; i < static_cast<int>(threads.size()); ++i) {
      const Thread& other = threads[i];
      if (other.done) continue;
      if (other.waits_of_row < mine.waits_of_row) return false;
      const bool same_block = i >= first && i < first + HostTeam::kThreads;
      if (same_block && other.waits_of_block < mine.waits_of_block) return false;
    }
    return true;
  }

  bool run(bool descending) {
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    const int count = static_cast<int>(threads.size());
    for (int at = 0; at < count; ++at) {
      getcontext(&threads[at].context);
      threads[at].context.uc_stack.ss_sp = threads[at].stack.get();
      threads[at].context.uc_stack.ss_size = kStack;
      makecontext(&threads[at].context, reinterpret_cast<void (*)()>(&enter), 3, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self), at);
    }
    for (int left = count; left;) {
      bool progress = false;
      for (int i = 0; i < count; ++i) {
        const int at = descending ? count - 1 - i : i;
        if (threads[at].done || !may_run(at)) continue;
        swapcontext(&scheduler, &threads[at].context);
        left -= threads[at].done;
        progress = true;
      }
      if (!progress) return false;  // they wait for each other
    }
    return true;
  }
};

int HostTeam::blocks() const { return row->blocks; }

void HostTeam::sync() {
  const int at = block_ * kThreads + thread_;
  ++row->threads[at].waits_of_block;
  row->wait(at);
}

void HostTeam::sync_row() {
  const int at = block_ * kThreads + thread_;
  ++row->threads[at].waits_of_block;
  ++row->threads[at].waits_of_row;
  row->wait(at);
}

}  // namespace

extern "C" int64_t scratch_bytes() { return sizeof(ChoiceScratch); }

extern "C" uint32_t uniform_of(const uint32_t* key, int position, int choice) {
  return uniform_bits(key, position, choice);
}

// Whether all threads came to their ends.
extern "C" bool choose_rows(const ChoiceArguments* arguments, int outputs, int blocks, bool descending) {
  ChoiceArguments a = *arguments;
  std::vector<ChoiceScratch> scratch(outputs);  // zeros
  a.scratch = scratch.data();
  for (int output = 0; output < outputs; ++output)
    if (!Row(&a, output, blocks).run(descending)) return false;
  return true;
}
