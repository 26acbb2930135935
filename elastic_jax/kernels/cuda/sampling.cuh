// Choosing tokens from logits: penalties, bias, grammar mask, top-k, top-p, min-p and one draw a row, or the most likely
// token. What it computes is what sampling.py computes.
//
// Several blocks share a row. Nothing depends on how many: probabilities are added as integers (`mass_of`), whose sums
// have no rounding and so no order, and the most likely token is found by an integer maximum. Thresholds of top-k and
// top-p are found by radix selection, 11 + 11 + 10 bits of the floats' ordered integers: three histograms each, without
// sorting.
//
// The algorithm knows of a `Team` only, the threads of one block: the tests run it on a CPU.
//   kThreads                        threads of a block, a power of two of at most kBins
//   thread(), block(), blocks()     which one this is, and how many blocks share the row
//   sync(), sync_row()              waits for the block's, for the row's threads; what they wrote can be read
//   add, most, load                 atomic addition (returns what was there), atomic maximum, reading what other blocks
//                                   wrote

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ELASTIC_DEVICE __device__ __forceinline__
#else
#include <cmath>
#include <cstring>
#define ELASTIC_DEVICE inline
#endif

namespace elastic {

constexpr int kMostBlocks = 32;  // of one row
constexpr int kBins = 2048;
constexpr int kLevels = 3;
constexpr int kMassBits = 44;  // of the most likely token's probability; leaves 2**20 tokens room in 64 bits
constexpr uint32_t kNanKey = 0xffffffffu;

// What the blocks of a row tell each other; zeros at first.
struct ChoiceScratch {
  uint64_t best;  // key of the most likely token, and the complement of its number: the first one wins
  uint64_t total;  // of the masses of all logits
  uint64_t mass[kMostBlocks];  // of the kept tokens of each block
  uint64_t bins[2][kLevels][kBins];
  uint32_t largest;  // key of the largest logit
  uint32_t not_finite;
  uint32_t arrived;
  uint32_t unused;
};

template <int kThreads>
struct ChoiceShared {
  uint64_t part[kThreads];
  uint32_t low[kBins];
  uint32_t high[kBins];
  uint64_t above;
  uint32_t bin;
};

// By row of the batch, as in `sampling.SamplingInputs`; all null where every row takes its most likely token.
struct SamplingRows {
  const float* temperature;
  const int* top_k;
  const float* top_p;
  const float* min_p;
  const float* repetition_penalty;
  const float* presence_penalty;
  const float* frequency_penalty;
  const int* choice;
  const int* bias_token;    // [rows][bias_entries]
  const float* bias;        // [rows][bias_entries]
  const uint32_t* allowed;  // [rows][words]
  const uint32_t* key;      // [rows][2]
  const int* counts;        // [rows][vocab]
  const uint32_t* prompt_mask;  // [rows][words]
  int rows, words, bias_entries;
};

struct ChoiceArguments {
  const float* logits;  // [outputs][vocab]
  int vocab;
  const int* row;       // [outputs], beyond the last for none
  const int* position;  // [outputs], of the new token
  SamplingRows by_row;
  int* token;              // [outputs]
  float* log_probability;  // [outputs], of that token by the logits as they are
  bool* finite;            // [outputs], whether all logits are
  float* scaled;           // [outputs][vocab], adjusted logits over the temperature; unused where no row samples
  ChoiceScratch* scratch;  // [outputs]
};

ELASTIC_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

ELASTIC_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// Integers in the order of the floats; zeros of both signs are equal, NaN is above all, as it is for argmax.
ELASTIC_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return kNanKey;
  return bits >> 31 ? 0u - bits : bits | 0x80000000u;
}

ELASTIC_DEVICE float value_of(uint32_t key) { return float_of(key >> 31 ? key & 0x7fffffffu : 0u - key); }

ELASTIC_DEVICE bool bit_of(const uint32_t* words, int i) { return words[i / 32] >> (i % 32) & 1; }

// The probability of a token relative to the most likely one, in units of 2**-kMassBits; 0 where either is no number.
ELASTIC_DEVICE uint64_t mass_of(float x, float largest) {
  const float relative = expf(x - largest);
  return relative > 0 ? static_cast<uint64_t>(relative * static_cast<float>(uint64_t{1} << kMassBits)) : 0;
}

// Threefry-2x32 with 20 rounds (Salmon et al., 2011), as in JAX.
ELASTIC_DEVICE void threefry(uint32_t k0, uint32_t k1, uint32_t& x0, uint32_t& x1) {
  const uint32_t keys[3] = {k0, k1, k0 ^ k1 ^ 0x1bd11bdau};
  const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  x0 += keys[0];
  x1 += keys[1];
  for (int i = 0; i < 5; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int by = rotations[i % 2][j];
      x0 += x1;
      x1 = (x1 << by | x1 >> (32 - by)) ^ x0;
    }
    x0 += keys[(i + 1) % 3];
    x1 += keys[(i + 2) % 3] + i + 1;
  }
}

// 23 random bits of a row, position and choice: the uniform number of sampling.py times 2**23.
ELASTIC_DEVICE uint32_t uniform_bits(const uint32_t* key, int position, int choice) {
  uint32_t a = key[0], b = key[1];
  const uint32_t data[2] = {static_cast<uint32_t>(position), static_cast<uint32_t>(choice)};
  for (int i = 0; i < 2; ++i) {
    uint32_t x0 = 0, x1 = data[i];
    threefry(a, b, x0, x1);
    a = x0;
    b = x1;
  }
  uint32_t x0 = 0, x1 = 0;
  threefry(a, b, x0, x1);
  return (x0 ^ x1) >> 9;
}

// floor(total * uniform / 2**23), without overflow.
ELASTIC_DEVICE uint64_t part_of(uint64_t total, uint32_t uniform) {
  constexpr uint64_t kLow = (uint64_t{1} << 23) - 1;
  return (total >> 23) * uniform + ((total & kLow) * uniform >> 23);
}

// Calls use(i, load(i)) for the block's share of [begin, end); several loads are in flight at once.
template <typename Team, typename Load, typename Use>
ELASTIC_DEVICE void for_each(const Team& team, int begin, int end, Load load, Use use) {
  constexpr int kAtOnce = 8, kThreads = Team::kThreads;
  for (int first = begin + team.thread(); first < end; first += kAtOnce * kThreads) {
    decltype(load(0)) x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kThreads < end) x[i] = load(first + i * kThreads);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kThreads < end) use(first + i * kThreads, x[i]);
  }
}

template <typename Team>
ELASTIC_DEVICE uint64_t largest_of(Team& team, uint64_t* part, uint64_t value) {
  const int t = team.thread();
  team.sync();
  part[t] = value;
  team.sync();
  for (int half = Team::kThreads / 2; half; half /= 2) {
    if (t < half && part[t + half] > part[t]) part[t] = part[t + half];
    team.sync();
  }
  return part[0];
}

// The sum of the values of this thread and of those before it; the last of `part` is that of all.
template <typename Team>
ELASTIC_DEVICE uint64_t running_sum(Team& team, uint64_t* part, uint64_t value) {
  const int t = team.thread();
  team.sync();
  part[t] = value;
  team.sync();
  for (int d = 1; d < Team::kThreads; d *= 2) {
    const uint64_t before = t >= d ? part[t - d] : 0;
    team.sync();
    part[t] += before;
    team.sync();
  }
  return part[t];
}

// 64-bit addition in shared memory by two native 32-bit ones: whoever makes the low word overflow carries.
template <typename Team>
ELASTIC_DEVICE void add_wide(Team& team, uint32_t* low, uint32_t* high, uint64_t value) {
  const uint32_t here = static_cast<uint32_t>(value);
  const uint32_t before = team.add(low, here);
  const uint32_t rest = static_cast<uint32_t>(value >> 32) + (before + here < before ? 1 : 0);
  if (rest) team.add(high, rest);
}

// The largest key t for which the weights of the keys >= t are at least `needed`; `weight(i, key)` is that of value i,
// and `needed(total)` is asked once. 0 where all weights are 0.
template <typename Team, typename Weight, typename Needed>
ELASTIC_DEVICE uint32_t select_key(Team& team, ChoiceShared<Team::kThreads>& shared, uint64_t (*bins)[kBins],
                                   const float* values, int begin, int end, Weight weight, Needed needed) {
  constexpr int kEach = kBins / Team::kThreads;
  const int t = team.thread();
  uint32_t prefix = 0;
  uint64_t above = 0, wanted = 0;
  for (int level = 0; level < kLevels; ++level) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, width = level == 2 ? 10 : 11;
    team.sync();
    for (int i = t; i < kBins; i += Team::kThreads) shared.low[i] = shared.high[i] = 0;
    team.sync();
    for_each(
        team, begin, end, [&](int i) { return values[i]; },
        [&](int i, float x) {
          const uint32_t key = key_of(x);
          if (level && key >> (shift + width) != prefix) return;
          const uint64_t w = weight(i, x, key);
          const uint32_t bin = key >> shift & ((1u << width) - 1);
          if (w) add_wide(team, &shared.low[bin], &shared.high[bin], w);
        });
    team.sync();
    for (int i = t; i < kBins; i += Team::kThreads) {
      const uint64_t w = static_cast<uint64_t>(shared.high[i]) << 32 | shared.low[i];
      if (w) team.add(&bins[level][i], w);
    }
    team.sync_row();
    // Each thread has some neighbouring bins, the first one those of the largest keys.
    uint64_t mine[kEach], sum = 0;
    const int top = kBins - 1 - t * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += mine[i] = team.load(&bins[level][top - i]);
    if (t == 0) {
      shared.bin = 0;
      shared.above = above;
    }
    uint64_t reached = above + running_sum(team, shared.part, sum);
    if (level == 0) wanted = needed(shared.part[Team::kThreads - 1]);
    uint64_t over = reached - sum;
    if (over < wanted && wanted <= reached) {
      int i = 0;
      while (over + mine[i] < wanted) over += mine[i++];
      shared.bin = top - i;
      shared.above = over;
    }
    team.sync();
    prefix = prefix << width | shared.bin;
    above = shared.above;
  }
  return prefix;
}

template <typename Team>
ELASTIC_DEVICE void choose_row(Team& team, ChoiceShared<Team::kThreads>& shared, const ChoiceArguments& a, int output) {
  const SamplingRows& s = a.by_row;
  const bool sampling = s.temperature != nullptr;
  const int row = sampling ? (a.row[output] < s.rows ? a.row[output] : s.rows - 1) : 0;
  const int t = team.thread(), vocab = a.vocab;
  const int share = (vocab + team.blocks() - 1) / team.blocks();
  const int begin = team.block() * share < vocab ? team.block() * share : vocab;
  const int end = begin + share < vocab ? begin + share : vocab;
  const float* const logits = a.logits + static_cast<int64_t>(output) * vocab;
  float* const scaled = sampling ? a.scaled + static_cast<int64_t>(output) * vocab : nullptr;
  ChoiceScratch& scratch = a.scratch[output];
  const float temperature = sampling ? s.temperature[row] : 0.0f;

  uint64_t best = 0;
  uint32_t largest = 0, not_finite = 0;
  const auto rank = [&](int i, float x) {
    const uint64_t here = static_cast<uint64_t>(key_of(x)) << 32 | ~static_cast<uint32_t>(i);
    best = here > best ? here : best;
  };
  const auto look = [&](float x) {
    const uint32_t key = key_of(x);
    largest = key > largest ? key : largest;
    not_finite |= (bits_of(x) & 0x7f800000u) == 0x7f800000u;
  };
  if (!sampling) {
    for_each(
        team, begin, end, [&](int i) { return logits[i]; },
        [&](int i, float x) {
          look(x);
          rank(i, x);
        });
  } else {
    const float repetition = s.repetition_penalty[row], presence = s.presence_penalty[row],
                frequency = s.frequency_penalty[row];
    const bool penalized = repetition != 1.0f || presence != 0.0f || frequency != 0.0f;
    const int* const counts = s.counts + static_cast<int64_t>(row) * vocab;
    const uint32_t* const prompt = s.prompt_mask + static_cast<int64_t>(row) * s.words;
    const uint32_t* const allowed = s.allowed + static_cast<int64_t>(row) * s.words;
    const float masked = -float_of(0x7f800000u);
    struct Token {
      float logit;
      int count;
      bool seen, allowed;
    };
    for_each(
        team, begin, end,
        [&](int i) {
          Token x = {logits[i], 0, false, bit_of(allowed, i)};
          if (penalized) {
            x.count = counts[i];
            x.seen = bit_of(prompt, i);
          }
          return x;
        },
        [&](int i, const Token& token) {
          float x = token.logit;
          look(x);
          if (penalized) {
            if (token.seen || token.count > 0) x = x > 0 ? x / repetition : x * repetition;
            x -= frequency * static_cast<float>(token.count);
            x -= presence * (token.count > 0 ? 1.0f : 0.0f);
          }
          scaled[i] = token.allowed ? x : masked;
        });
    team.sync();
    for (int i = t; i < s.bias_entries; i += Team::kThreads) {
      const int64_t at = static_cast<int64_t>(row) * s.bias_entries + i;
      const int token = s.bias_token[at];
      if (token >= begin && token < end && bit_of(allowed, token)) team.add(&scaled[token], s.bias[at]);
    }
    team.sync();
    const float by = temperature > 0 ? temperature : 1.0f;
    for_each(
        team, begin, end, [&](int i) { return scaled[i]; },
        [&](int i, float x) {
          x /= by;
          scaled[i] = x;
          rank(i, x);
        });
  }
  best = largest_of(team, shared.part, best);
  largest = static_cast<uint32_t>(largest_of(team, shared.part, largest));
  not_finite = static_cast<uint32_t>(largest_of(team, shared.part, not_finite));
  if (t == 0) {
    team.most(&scratch.best, best);
    team.most(&scratch.largest, largest);
    team.most(&scratch.not_finite, not_finite);
  }
  team.sync_row();

  best = team.load(&scratch.best);
  const float largest_logit = value_of(team.load(&scratch.largest));
  uint64_t sum = 0;
  for_each(
      team, begin, end, [&](int i) { return logits[i]; }, [&](int, float x) { sum += mass_of(x, largest_logit); });
  running_sum(team, shared.part, sum);
  if (t == 0) team.add(&scratch.total, shared.part[Team::kThreads - 1]);
  const auto write = [&](int token) {
    a.token[output] = token;
    const float all = static_cast<float>(team.load(&scratch.total)) / static_cast<float>(uint64_t{1} << kMassBits);
    a.log_probability[output] = logits[token] - largest_logit - logf(all);
    a.finite[output] = !team.load(&scratch.not_finite);
  };
  const int most_likely = static_cast<int>(~static_cast<uint32_t>(best));
  if (!(temperature > 0)) {
    team.sync_row();
    if (team.block() == 0 && t == 0) write(most_likely);
    return;
  }

  const float top = value_of(static_cast<uint32_t>(best >> 32)), min_p = s.min_p[row], top_p = s.top_p[row];
  const int top_k = s.top_k[row];
  uint32_t least = min_p > 0 ? key_of(top + logf(min_p > 1e-30f ? min_p : 1e-30f)) : 0;
  uint32_t by_count = 0;
  if (top_k > 0 && top_k < vocab)
    by_count = select_key(
        team, shared, scratch.bins[0], scaled, begin, end, [](int, float, uint32_t) { return uint64_t{1}; },
        [&](uint64_t) { return static_cast<uint64_t>(top_k); });
  least = by_count > least ? by_count : least;
  if (top_p < 1) {
    const uint32_t by_mass = select_key(
        team, shared, scratch.bins[1], scaled, begin, end,
        [&](int, float x, uint32_t key) { return key >= by_count ? mass_of(x, top) : 0; },
        [&](uint64_t total) {
          const double exact = static_cast<double>(top_p) * static_cast<double>(total);
          uint64_t wanted = static_cast<uint64_t>(exact);
          if (static_cast<double>(wanted) < exact || wanted == 0) ++wanted;
          return wanted < total ? wanted : total;
        });
    least = by_mass > least ? by_mass : least;
  }

  // Each thread has some neighbouring tokens, so that running sums are in the tokens' order.
  const int each = (end - begin + Team::kThreads - 1) / Team::kThreads;
  const int from = begin + t * each < end ? begin + t * each : end, to = from + each < end ? from + each : end;
  const auto kept_mass = [&](int i) {
    const float x = scaled[i];
    return key_of(x) >= least ? mass_of(x, top) : 0;
  };
  sum = 0;
  for (int i = from; i < to; ++i) sum += kept_mass(i);
  const uint64_t reached = running_sum(team, shared.part, sum);
  if (t == 0) scratch.mass[team.block()] = shared.part[Team::kThreads - 1];
  team.sync_row();
  uint64_t before = 0, total = 0;
  for (int i = 0; i < team.blocks(); ++i) {
    const uint64_t there = team.load(&scratch.mass[i]);
    if (i < team.block()) before += there;
    total += there;
  }
  if (total == 0) {  // Every token is masked, or a logit is no number: whatever is chosen, it is a token.
    if (team.block() == 0 && t == 0) write(most_likely);
    return;
  }
  const uint64_t target = part_of(total, uniform_bits(s.key + 2 * row, a.position[output], s.choice[row]));
  uint64_t passed = before + reached - sum;
  if (target < passed || target >= passed + sum) return;
  int token = from;
  while (target >= (passed += kept_mass(token))) ++token;
  write(token);
}

}  // namespace elastic
