// Order statistics of all finite ratios f / r of a list of tensors, none of which is ever stored.
// Reads f and r once a pass of the radix selection (order_statistics.h), whose runs are spread over the threads.
#pragma once

#include <cmath>

#include "cpu/importances.h"
#include "cpu/order_statistics.h"

namespace unlearn {

// C: what the ratio is computed in; K: what the ratios of all tensors are compared in.
template <class C, class K>
UNLEARN_CLONED void ratio_keys(const C* f, const C* r, int64_t n, Key<K>* keys) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C ratio = f[i] / r[i];
    keys[i] = is_finite(ratio) ? key_of(K(ratio)) : NO_KEY<K>;
  }
}

template <class C, class K>
void ratio_keys(const Importances& t, int64_t start, int64_t count, Key<K>* keys) {
  C f[KEY_SLAB], r[KEY_SLAB];
  ratio_keys<C, K>(read(t.f, t.shape, start, count, f), read(t.r, t.shape, start, count, r), count, keys);
}

struct Neighbours {
  double below, above;
};

// For each q in [0, 100] the ratios at the ranks around (count - 1) * q / 100. 0 where there is no finite ratio.
template <class K>
std::vector<Neighbours> ratio_neighbours(
    const std::vector<Importances>& tensors, const std::vector<double>& q, int64_t& count) {
  WorkList work;
  for (const Importances& t : tensors) work.add(t.n);
  const auto source = [&](const Run& run, int64_t start, int64_t n, Key<K>* keys) {
    const Importances& t = tensors[run.tensor];
    if constexpr (std::is_same_v<K, double>) {
      if (t.wide()) return ratio_keys<double, K>(t, start, n, keys);
    }
    ratio_keys<float, K>(t, start, n, keys);
  };
  const Histogram leading = leading_digits<K>(work, source);
  count = 0;
  for (int64_t bin = 0; bin < BINS - 1; ++bin) count += leading[bin];
  std::vector<Neighbours> neighbours(q.size(), {0, 0});
  if (count == 0) return neighbours;
  std::vector<int64_t> ranks;
  for (const double percent : q) {
    const int64_t rank = int64_t(std::floor(double(count - 1) * (percent / 100)));
    ranks.push_back(rank);
    ranks.push_back(std::min(rank + 1, count - 1));
  }
  const std::vector<Key<K>> keys = keys_at<K>(work, source, leading, ranks);
  for (size_t i = 0; i < q.size(); ++i) {
    neighbours[i] = {double(value_of<K>(keys[2 * i])), double(value_of<K>(keys[2 * i + 1]))};
  }
  return neighbours;
}

}  // namespace unlearn
