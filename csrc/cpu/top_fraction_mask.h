// Marks the `wanted` largest scores of a list of tensors; of equal scores the first ones. No sort.
// Reads the scores once a pass of the radix selection that finds the smallest marked score (order_statistics.h), once
// more to write the masks, and again only in runs that hold scores equal to it.
#pragma once

#include "cpu/order_statistics.h"

namespace unlearn {

struct ScoreTensor {
  Axes shape;
  Strided scores;
  int64_t n;
  bool* mask;  // contiguous
};

template <class K>
UNLEARN_CLONED void score_keys(const K* scores, int64_t n, Key<K>* keys) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const K score = scores[i] == 0 ? K(0) : scores[i];  // -0 and 0 are equal
    keys[i] = score == score ? key_of(score) : NO_KEY<K>;
  }
}

// Marks what is above `least`; returns how many are equal to it.
template <class K>
UNLEARN_CLONED int64_t mark_above(const Key<K>* keys, int64_t n, Key<K> least, bool* mask) {
  int32_t equal = 0;  // of a slab
#pragma omp simd reduction(+ : equal)
  for (int64_t i = 0; i < n; ++i) {
    mask[i] = keys[i] > least && keys[i] != NO_KEY<K>;
    equal += keys[i] == least;
  }
  return equal;
}

// Returns how many scores are numbers; the masks are written only if that is at least `wanted`.
template <class K>
int64_t mark_largest(const std::vector<ScoreTensor>& tensors, int64_t wanted) {
  WorkList work;
  for (const ScoreTensor& t : tensors) work.add(t.n);
  const auto source = [&](const Run& run, int64_t start, int64_t n, Key<K>* keys) {
    const ScoreTensor& t = tensors[run.tensor];
    K buffer[KEY_SLAB];
    score_keys(read(t.scores, t.shape, start, n, buffer), n, keys);
  };
  const auto for_each_mask = [&](const Run& run, const auto& visit) {
    bool* mask = tensors[run.tensor].mask + run.start;
    for_each_slab<K>(source, run, [&](const Key<K>* keys, int64_t n) {
      visit(keys, n, mask);
      mask += n;
    });
  };
  const Histogram leading = leading_digits<K>(work, source);
  int64_t numbers = 0;
  for (int64_t bin = 0; bin < BINS - 1; ++bin) numbers += leading[bin];
  if (wanted > numbers) return numbers;
  // Where none is wanted, no key is above the largest.
  const Key<K> least = wanted == 0 ? NO_KEY<K> - 1 : keys_at<K>(work, source, leading, {numbers - wanted})[0];

  std::vector<int64_t> equal(work.runs().size()), above(work.runs().size());
  work.for_each([&](const Run& run, int64_t index) {
    for_each_mask(run, [&](const Key<K>* keys, int64_t n, bool* mask) {
      equal[index] += mark_above<K>(keys, n, least, mask);
      for (int64_t i = 0; i < n; ++i) above[index] += mask[i];
    });
  });
  int64_t left = wanted;
  for (const int64_t n : above) left -= n;
  for (size_t index = 0; left > 0 && index < equal.size(); ++index) {
    if (equal[index] == 0) continue;
    for_each_mask(work.runs()[index], [&](const Key<K>* keys, int64_t n, bool* mask) {
      for (int64_t i = 0; i < n && left > 0; ++i) {
        if (keys[i] == least) mask[i] = true, --left;
      }
    });
  }
  return numbers;
}

}  // namespace unlearn
