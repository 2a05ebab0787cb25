// How many elements each alpha selects: f > alpha * r, for every tensor and every alpha.
// Reads f and r once, whatever the number of alphas is: a slab stays in the first-level cache while all are counted.
// Work: runs of all tensors, spread over the threads (work_list.h).
#pragma once

#include "cpu/importances.h"
#include "cpu/work_list.h"

namespace unlearn {

constexpr int64_t CURVE_SLAB = 1024;  // elements

template <class C>
UNLEARN_CLONED int64_t count_selected(const C* f, const C* r, int64_t n, C alpha) {
  int32_t selected = 0;  // of a slab
#pragma omp simd reduction(+ : selected)
  for (int64_t i = 0; i < n; ++i) selected += f[i] > r[i] * alpha;
  return selected;
}

// Adds to counts[alphas].
template <class C>
void count_run(const Importances& t, const Run& run, const std::vector<double>& alphas, int64_t* counts) {
  C f[CURVE_SLAB], r[CURVE_SLAB];
  for (int64_t done = 0; done < run.count; done += CURVE_SLAB) {
    const int64_t count = std::min(CURVE_SLAB, run.count - done), start = run.start + done;
    const C *fs = read(t.f, t.shape, start, count, f), *rs = read(t.r, t.shape, start, count, r);
    for (size_t a = 0; a < alphas.size(); ++a) counts[a] += count_selected(fs, rs, count, C(alphas[a]));
  }
}

// counts [tensors, alphas]
inline std::vector<int64_t> count_selections(
    const std::vector<Importances>& tensors, const std::vector<double>& alphas) {
  WorkList work;
  for (const Importances& t : tensors) work.add(t.n);
  std::vector<int64_t> counts(tensors.size() * alphas.size());
  using Counts = std::vector<int64_t>;
  work.for_each<Counts>(
      [&](Counts& own, const Run& run, int64_t) {
        own.resize(counts.size());
        int64_t* row = own.data() + run.tensor * alphas.size();
        const Importances& t = tensors[run.tensor];
        if (t.wide())
          count_run<double>(t, run, alphas, row);
        else
          count_run<float>(t, run, alphas, row);
      },
      [&](const Counts& own) {
        for (size_t i = 0; i < own.size(); ++i) counts[i] += own[i];
      });
  return counts;
}

}  // namespace unlearn
