// Selective dampening of one run of elements, in place:
//   p <- p * min((lam * r / f)^exponent, cap)   where f > alpha * r
//
// Fused: selection, factor, product, and the report's counts. Reads f and r; reads and writes p only in blocks where
// something is selected, so that an untouched block moves 8 bytes an element in float32 instead of 16.
// Work: fixed runs of elements, spread over torch's threads; their counts are added in order, so that the report does
// not depend on the number of threads.
// Every step is one IEEE operation in the published order, so that float32 results match it bit for bit.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "cpu/scalar.h"

namespace unlearn {

constexpr int64_t DAMPEN_BLOCK = 128;  // elements whose p is skipped together
constexpr int64_t DAMPEN_RUN = 65536;  // elements a thread takes at a time

struct DampenSettings {
  double alpha, lam, exponent, cap;
};

struct DampenStats {
  int64_t selected = 0, non_finite = 0, non_finite_selected = 0;
  double factor_sum = 0;
};

// torch computes these exponents without pow, and so do we, to agree bit for bit. For any other exponent the power is
// taken in double and rounded once, which may differ from torch's float pow in the last bit.
enum class Exponent { one, half, two, three, other };

inline Exponent exponent_kind(double exponent) {
  return exponent == 1.0   ? Exponent::one
         : exponent == 0.5 ? Exponent::half
         : exponent == 2.0 ? Exponent::two
         : exponent == 3.0 ? Exponent::three
                           : Exponent::other;
}

template <Exponent kind, class C>
UNLEARN_INLINE C raised(C ratio, double exponent) {
  if constexpr (kind == Exponent::one) return ratio;
  if constexpr (kind == Exponent::half) return std::sqrt(ratio);
  if constexpr (kind == Exponent::two) return ratio * ratio;
  if constexpr (kind == Exponent::three) return ratio * ratio * ratio;
  return C(std::pow(double(ratio), exponent));
}

// P: the parameter's type; C: the type of the importances, in which all is computed (float, or double).
template <Exponent kind, class P, class C>
UNLEARN_CLONED void dampen_run(
    P* p, const C* f, const C* r, int64_t n, const DampenSettings& settings, DampenStats& stats) {
  const C alpha = C(settings.alpha), lam = C(settings.lam), cap = C(settings.cap);
  const double exponent = settings.exponent;
  const C infinity = std::numeric_limits<C>::infinity();
  for (int64_t start = 0; start < n; start += DAMPEN_BLOCK) {
    const int64_t count = n - start < DAMPEN_BLOCK ? n - start : DAMPEN_BLOCK;
    const C *fb = f + start, *rb = r + start;
    P* pb = p + start;
    int32_t selected = 0, non_finite = 0;
#pragma omp simd reduction(+ : selected, non_finite)
    for (int64_t i = 0; i < count; ++i) {
      selected += fb[i] > rb[i] * alpha;
      non_finite += !(is_finite(fb[i]) & is_finite(rb[i]));
    }
    stats.non_finite += non_finite;
    if (selected == 0) continue;
    stats.selected += selected;

    int32_t non_finite_selected = 0;
    double factor_sum = 0;
#pragma omp simd reduction(+ : non_finite_selected, factor_sum)
    for (int64_t i = 0; i < count; ++i) {
      const bool chosen = fb[i] > rb[i] * alpha;
      C factor = raised<kind>(C(rb[i] * lam) / fb[i], exponent);
      factor = fb[i] == infinity ? C(0) : factor;  // lam * r may overflow, and inf / inf is no factor
      factor = factor > cap ? cap : factor;
      const C value = C(load(pb[i]));
      const P dampened = store<P>(compute_t<P>(value * factor));
      pb[i] = chosen ? dampened : pb[i];
      factor_sum += chosen ? double(factor) : 0.0;
      non_finite_selected += chosen & !is_finite(value);
    }
    stats.non_finite_selected += non_finite_selected;
    stats.factor_sum += factor_sum;
  }
}

template <class P, class C>
void dampen_run(P* p, const C* f, const C* r, int64_t n, const DampenSettings& settings, DampenStats& stats) {
  switch (exponent_kind(settings.exponent)) {
    case Exponent::one: return dampen_run<Exponent::one>(p, f, r, n, settings, stats);
    case Exponent::half: return dampen_run<Exponent::half>(p, f, r, n, settings, stats);
    case Exponent::two: return dampen_run<Exponent::two>(p, f, r, n, settings, stats);
    case Exponent::three: return dampen_run<Exponent::three>(p, f, r, n, settings, stats);
    case Exponent::other: return dampen_run<Exponent::other>(p, f, r, n, settings, stats);
  }
}

// Dampens n contiguous elements.
template <class P, class C>
DampenStats dampen_array(P* p, const C* f, const C* r, int64_t n, const DampenSettings& settings) {
  const int64_t runs = (n + DAMPEN_RUN - 1) / DAMPEN_RUN;
  std::vector<DampenStats> stats(runs);
  torch::stable::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t start = run * DAMPEN_RUN, count = n - start < DAMPEN_RUN ? n - start : DAMPEN_RUN;
      dampen_run(p + start, f + start, r + start, count, settings, stats[run]);
    }
  });
  DampenStats total;
  for (const DampenStats& part : stats) {
    total.selected += part.selected;
    total.non_finite += part.non_finite;
    total.non_finite_selected += part.non_finite_selected;
    total.factor_sum += part.factor_sum;
  }
  return total;
}

}  // namespace unlearn
