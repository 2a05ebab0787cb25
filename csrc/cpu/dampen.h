// Selective dampening of a list of parameters, in place:
//   p <- p * min((lam * r / f)^exponent, cap), not below floor * p,   where f > alpha * r
//
// Fused: selection, factor, product, and the report's counts. Reads f and r; reads and writes p only in blocks where
// something is selected, so that an untouched block moves 8 bytes an element in float32 instead of 16.
// Work: one list of runs over all tensors (work_list.h). What is not contiguous, or of another dtype than it is computed
// in, passes through buffers of a slab, which stay in the first-level cache; nothing is copied as a whole.
// Every step is one IEEE operation in the published order, so that float32 results match it bit for bit.
#pragma once

#include <cmath>

#include "cpu/strided.h"
#include "cpu/work_list.h"

namespace unlearn {

constexpr int64_t DAMPEN_BLOCK = 128;  // elements whose p is skipped together
constexpr int64_t DAMPEN_AHEAD = 4;    // blocks in which p has time to arrive
constexpr int64_t DAMPEN_SLAB = 1024;  // elements that are converted together

struct DampenTensor {
  Axes shape;
  Strided p, f, r;
  int64_t n;
  double alpha, lam;

  // Computed in double where any of the three is.
  bool wide() const { return p.dtype == Float::float64 || f.dtype == Float::float64 || r.dtype == Float::float64; }
};

struct DampenSettings {
  double exponent, cap, floor;
};

struct DampenStats {
  int64_t selected = 0, non_finite = 0, non_finite_selected = 0;
  double factor_sum = 0;

  void add(const DampenStats& other) {
    selected += other.selected;
    non_finite += other.non_finite;
    non_finite_selected += other.non_finite_selected;
    factor_sum += other.factor_sum;
  }
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

// p of a block that will be changed soon. Addresses beyond the end are harmless.
template <class P>
UNLEARN_INLINE void prefetch_block(const P* block) {
  for (int64_t line = 0; line < int64_t(DAMPEN_BLOCK * sizeof(P)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(block) + line, 1, 3);
  }
}

template <class P>
UNLEARN_INLINE void store_where(bool chosen, P value, P& target) {
  if constexpr (sizeof(P) == 2)  // bits, since no loop that selects a struct is vectorised
    target.bits = chosen ? value.bits : target.bits;
  else
    target = chosen ? value : target;
}

template <Exponent kind, class C>
UNLEARN_INLINE C factor_of(C f, C r, C lam, double exponent, C cap, C floor) {
  C factor = raised<kind>(C(r * lam) / f, exponent);
  factor = f == std::numeric_limits<C>::infinity() ? C(0) : factor;  // lam * r may overflow, and inf / inf is no factor
  factor = factor > cap ? cap : factor;
  return factor < floor ? floor : factor;
}

// P: the parameter's type; C: the type in which all is computed, float or double.
template <Exponent kind, class P, class C>
UNLEARN_INLINE void dampen_block(
    P* p, const C* f, const C* r, int64_t n, C alpha, C lam, const DampenSettings& settings, DampenStats& stats) {
  const C cap = C(settings.cap), floor = C(settings.floor);
  const double exponent = settings.exponent;
  int32_t non_finite_selected = 0;
  double factor_sum = 0;
  if constexpr (sizeof(P) > 2) {
#pragma omp simd reduction(+ : non_finite_selected, factor_sum)
    for (int64_t i = 0; i < n; ++i) {
      const bool chosen = f[i] > r[i] * alpha;
      const C factor = factor_of<kind>(f[i], r[i], lam, exponent, cap, floor), value = C(p[i]);
      const P dampened = P(value * factor);
      p[i] = chosen ? dampened : p[i];
      factor_sum += chosen ? double(factor) : 0.0;
      non_finite_selected += chosen & !is_finite(value);
    }
  } else {  // the compiler vectorises no loop that mixes 16, 32 and 64 bits under one condition, nor one on structs
    C factors[DAMPEN_BLOCK], values[DAMPEN_BLOCK];
#pragma omp simd reduction(+ : non_finite_selected)
    for (int64_t i = 0; i < n; ++i) {
      const bool chosen = f[i] > r[i] * alpha;
      const C factor = factor_of<kind>(f[i], r[i], lam, exponent, cap, floor), value = C(load(p[i]));
      values[i] = value * factor;
      factors[i] = chosen ? factor : C(0);
      non_finite_selected += chosen & !is_finite(value);
    }
#pragma omp simd reduction(+ : factor_sum)
    for (int64_t i = 0; i < n; ++i) factor_sum += double(factors[i]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t dampened = store<P>(float(values[i])).bits;
      p[i].bits = f[i] > r[i] * alpha ? dampened : p[i].bits;
    }
  }
  stats.non_finite_selected += non_finite_selected;
  stats.factor_sum += factor_sum;
}

template <Exponent kind, class P, class C>
UNLEARN_CLONED void dampen_values(
    P* p, const C* f, const C* r, int64_t n, C alpha, C lam, const DampenSettings& settings, DampenStats& stats) {
  const int64_t blocks = (n + DAMPEN_BLOCK - 1) / DAMPEN_BLOCK;
  bool waiting[DAMPEN_AHEAD] = {}, touched = false;
  for (int64_t block = 0; block < blocks + DAMPEN_AHEAD; ++block) {
    int64_t start = block * DAMPEN_BLOCK, ready = -1;
    bool& waits = waiting[block % DAMPEN_AHEAD];
    if (waits) ready = start - DAMPEN_AHEAD * DAMPEN_BLOCK;
    waits = false;
    if (block < blocks) {
      const int64_t count = n - start < DAMPEN_BLOCK ? n - start : DAMPEN_BLOCK;
      const C *fb = f + start, *rb = r + start;
      int32_t selected = 0, non_finite = 0;
#pragma omp simd reduction(+ : selected, non_finite)
      for (int64_t i = 0; i < count; ++i) {
        selected += fb[i] > rb[i] * alpha;
        non_finite += !(is_finite(fb[i]) & is_finite(rb[i]));
      }
      stats.selected += selected;
      stats.non_finite += non_finite;
      // After a touched block p is on its way already. A block on its own is fetched, and changed a few blocks later.
      const bool before = touched;
      touched = selected > 0;
      if (touched && before)
        dampen_block<kind>(p + start, f + start, r + start, count, alpha, lam, settings, stats);
      else if (touched)
        prefetch_block(p + start), waits = true;
    }
    if (ready >= 0) {
      const int64_t count = n - ready < DAMPEN_BLOCK ? n - ready : DAMPEN_BLOCK;
      dampen_block<kind>(p + ready, f + ready, r + ready, count, alpha, lam, settings, stats);
    }
  }
}

template <class P, class C>
void dampen_values(
    P* p, const C* f, const C* r, int64_t n, C alpha, C lam, const DampenSettings& settings, DampenStats& stats) {
  switch (exponent_kind(settings.exponent)) {
    case Exponent::one: return dampen_values<Exponent::one>(p, f, r, n, alpha, lam, settings, stats);
    case Exponent::half: return dampen_values<Exponent::half>(p, f, r, n, alpha, lam, settings, stats);
    case Exponent::two: return dampen_values<Exponent::two>(p, f, r, n, alpha, lam, settings, stats);
    case Exponent::three: return dampen_values<Exponent::three>(p, f, r, n, alpha, lam, settings, stats);
    case Exponent::other: return dampen_values<Exponent::other>(p, f, r, n, alpha, lam, settings, stats);
  }
}

template <class P, class C>
DampenStats dampen_run(const DampenTensor& t, const Run& run, const DampenSettings& settings) {
  DampenStats stats;
  const bool direct = t.p.dense() && t.f.dense() && t.r.dense() && t.f.dtype == float_of<C> && t.r.dtype == float_of<C>;
  const int64_t step = direct ? run.count : DAMPEN_SLAB, end = run.start + run.count;
  C f[DAMPEN_SLAB], r[DAMPEN_SLAB];
  P gathered[DAMPEN_SLAB];
  for (int64_t start = run.start; start < end; start += step) {
    const int64_t count = std::min(step, end - start), before = stats.selected;
    const C *fs = read(t.f, t.shape, start, count, f), *rs = read(t.r, t.shape, start, count, r);
    P* p = gathered;
    if (t.p.dense())
      p = static_cast<P*>(t.p.data) + start;
    else
      gather(t.p, t.shape, start, count, p);
    dampen_values(p, fs, rs, count, C(t.alpha), C(t.lam), settings, stats);
    if (p == gathered && stats.selected > before) scatter(t.p, t.shape, start, count, p);
  }
  return stats;
}

inline DampenStats dampen_run(const DampenTensor& t, const Run& run, const DampenSettings& settings) {
  return dispatch(t.p.dtype, [&](auto type) {
    using P = decltype(type);
    if constexpr (!std::is_same_v<P, double>) {
      if (!t.wide()) return dampen_run<P, float>(t, run, settings);
    }
    return dampen_run<P, double>(t, run, settings);
  });
}

// Dampens all of them; returns the counts of each.
inline std::vector<DampenStats> dampen(const std::vector<DampenTensor>& tensors, const DampenSettings& settings) {
  WorkList work;
  for (const DampenTensor& t : tensors) work.add(t.n);
  std::vector<DampenStats> parts(work.runs().size()), stats(tensors.size());
  work.for_each([&](const Run& run, int64_t index) { parts[index] = dampen_run(tensors[run.tensor], run, settings); });
  for (size_t i = 0; i < parts.size(); ++i) stats[work.runs()[i].tensor].add(parts[i]);
  return stats;
}

}  // namespace unlearn
