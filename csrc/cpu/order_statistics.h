// Exact order statistics of values that are never stored: radix selection. A first pass over the data counts how often
// each leading 16 bits occur; each further pass counts the next 16 bits of what shares its leading bits with one of the
// wanted values, until all bits are known. Two passes for float32, four for float64, whatever the values are.
//
// Values are keys: unsigned integers in the order of the floating-point numbers, so that no value needs rounding.
// Memory: a histogram of 512 KiB a thread, and below HISTOGRAM_BYTES in all for the further passes.
#pragma once

#include <thread>

#include "cpu/strided.h"
#include "cpu/work_list.h"

namespace unlearn {

constexpr int64_t BINS = 65536;
constexpr int64_t KEY_SLAB = 1024;               // keys that are made together
constexpr int64_t HISTOGRAM_BYTES = 32LL << 20;  // of all threads

using Histogram = std::vector<int64_t>;

template <class C>
using Key = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;

template <class C>
constexpr Key<C> NO_KEY = ~Key<C>(0);  // of what is not counted; no number has it

// Order-preserving; NaN has no place in the order, and is for the caller to replace.
template <class C>
UNLEARN_INLINE Key<C> key_of(C x) {
  constexpr Key<C> sign = Key<C>(1) << (sizeof(C) * 8 - 1);
  const Key<C> bits = bit_cast<Key<C>>(x);
  return bits & sign ? ~bits : bits | sign;
}

template <class C>
C value_of(Key<C> key) {
  constexpr Key<C> sign = Key<C>(1) << (sizeof(C) * 8 - 1);
  return bit_cast<C>(Key<C>(key & sign ? key & ~sign : ~key));
}

// visit(keys, count) for a run, a slab at a time; source(run, start, count, keys) makes them.
template <class C, class Source, class Visit>
void for_each_slab(const Source& source, const Run& run, const Visit& visit) {
  Key<C> keys[KEY_SLAB];
  for (int64_t done = 0; done < run.count; done += KEY_SLAB) {
    const int64_t count = std::min(KEY_SLAB, run.count - done);
    source(run, run.start + done, count, keys);
    visit(keys, count);
  }
}

// How often each leading 16 bits occur; the last bin holds what is not counted.
template <class C, class Source>
Histogram leading_digits(const WorkList& work, const Source& source) {
  Histogram total(BINS);
  work.for_each<Histogram>(
      [&](Histogram& own, const Run& run, int64_t) {
        own.resize(BINS);
        int64_t* bins = own.data();
        for_each_slab<C>(source, run, [&](const Key<C>* keys, int64_t n) {
          for (int64_t i = 0; i < n; ++i) ++bins[keys[i] >> (sizeof(C) * 8 - 16)];
        });
      },
      [&](const Histogram& own) {
        for (size_t i = 0; i < own.size(); ++i) total[i] += own[i];
      });
  return total;
}

// The bin that holds the value of that rank; subtracts from the rank what is in the bins before.
inline int64_t bin_of(const int64_t* bins, int64_t& rank) {
  int64_t bin = 0;
  for (; bin < BINS - 1 && rank >= bins[bin]; ++bin) rank -= bins[bin];
  return bin;
}

// Histograms of the 16 bits after `prefixes`, which are sorted, distinct and all known to the same bit: `known`.
template <class C, class Source>
std::vector<Histogram> next_digits(
    const WorkList& work, const Source& source, const std::vector<Key<C>>& prefixes, int known) {
  constexpr int bits = sizeof(C) * 8;
  constexpr uint16_t none = 0xffff;
  std::vector<uint16_t> first(BINS, none);  // leading 16 bits -> the first prefix that has them
  for (size_t i = prefixes.size(); i-- > 0;) first[prefixes[i] >> (known - 16)] = uint16_t(i);
  const size_t n_prefixes = prefixes.size();
  Histogram total(n_prefixes * BINS);
  work.for_each<Histogram>(
      [&](Histogram& own, const Run& run, int64_t) {
        own.resize(n_prefixes * BINS);
        for_each_slab<C>(source, run, [&](const Key<C>* keys, int64_t n) {
          for (int64_t i = 0; i < n; ++i) {
            uint16_t slot = first[keys[i] >> (bits - 16)];
            if (slot == none) continue;
            const Key<C> prefix = keys[i] >> (bits - known);
            while (slot < n_prefixes && prefixes[slot] < prefix) ++slot;
            if (slot < n_prefixes && prefixes[slot] == prefix) {
              ++own[slot * BINS + (keys[i] >> (bits - known - 16)) % BINS];
            }
          }
        });
      },
      [&](const Histogram& own) {
        for (size_t i = 0; i < own.size(); ++i) total[i] += own[i];
      });
  std::vector<Histogram> histograms;
  for (size_t i = 0; i < n_prefixes; ++i) {
    histograms.emplace_back(total.begin() + i * BINS, total.begin() + (i + 1) * BINS);
  }
  return histograms;
}

// The keys at these ranks (from 0, the smallest), each below the number of counted keys.
template <class C, class Source>
std::vector<Key<C>> keys_at(
    const WorkList& work, const Source& source, const Histogram& leading, std::vector<int64_t> ranks) {
  constexpr int bits = sizeof(C) * 8;
  std::vector<Key<C>> keys;
  for (int64_t& rank : ranks) keys.push_back(Key<C>(bin_of(leading.data(), rank)));
  const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
  // One histogram a thread and one in all for each prefix.
  const size_t together = size_t(std::max<int64_t>(1, HISTOGRAM_BYTES / ((threads + 2) * BINS * 8)));
  for (int known = 16; known < bits; known += 16) {
    std::vector<Key<C>> distinct = keys;
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    std::vector<Key<C>> longer = keys;
    for (size_t begin = 0; begin < distinct.size(); begin += together) {
      const std::vector<Key<C>> batch(
          distinct.begin() + begin, distinct.begin() + std::min(begin + together, distinct.size()));
      const std::vector<Histogram> histograms = next_digits<C>(work, source, batch, known);
      for (size_t i = 0; i < keys.size(); ++i) {
        const auto found = std::lower_bound(batch.begin(), batch.end(), keys[i]);
        if (found == batch.end() || *found != keys[i]) continue;
        longer[i] = keys[i] << 16 | Key<C>(bin_of(histograms[found - batch.begin()].data(), ranks[i]));
      }
    }
    keys = longer;
  }
  return keys;
}

}  // namespace unlearn
