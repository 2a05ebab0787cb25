// A segment of a row of token log-probabilities.
//
// Forward, fused: maximum, sum of exponentials and the label's log-probability; on request also what entropy and mean
// need. Reads the segment once: a block stays in the first-level cache between its maximum and its sum. The label's own
// term is kept out of the sum, so that log p = -log1p(sum of the others / own) keeps its relative precision as p -> 1.
// Backward, fused: softmax from the saved maximum and log-sum, minus one-hot, times the row's cotangents. Reads the
// segment once and writes it once; `out` may be the row itself.
// Work: one segment a call; segments are spread over threads by the caller, which merges a row's sums in their order.
#pragma once

#include "cpu/rows.h"

namespace unlearn {

// The sums are in double: they collect float block sums, up to V / ROW_BLOCK of them.
template <class C>
struct RowSums {
  C max = -std::numeric_limits<C>::infinity();  // of the others' z, as the label's is left out of all but `total`
  double sum = 0;                               // sum of exp(z - max)
  double weighted = 0;                          // sum of exp(z - max) * (z - max)
  double total = 0;                             // sum of z
  C own = -std::numeric_limits<C>::infinity();  // the label's z, in the segment that holds it

  void raise_max(C to) {
    if (!(to > max)) return;
    if (sum != 0) {  // otherwise 0 * inf could follow
      const double down = double(max) - double(to), factor = std::exp(down);
      weighted = factor == 0 ? weighted * 0 + sum * 0 : (weighted + sum * down) * factor;
      sum *= factor;
    }
    max = to;
  }
  void merge(RowSums next) {
    next.raise_max(max);
    raise_max(next.max);
    sum += next.sum;
    weighted += next.weighted;
    total += next.total;
    own = next.own > own || next.own != next.own ? next.own : own;
  }
};

template <bool STATISTICS, class T, class C>
UNLEARN_INLINE void add_block(const T* z, int64_t n, RowSums<C>& sums) {
  constexpr C lowest = -std::numeric_limits<C>::infinity();
  C max = sums.max;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) {
    const C value = load(z[j]);
    max = value > max ? value : max;
  }
  if (max == lowest) {  // -inf adds nothing, and -inf - -inf must not reach the sum; NaN must
    for (int64_t j = 0; j < n; ++j) sums.sum += load(z[j]) != load(z[j]) ? load(z[j]) : C(0);
    return;
  }
  C sum = 0, weighted = 0;
  if constexpr (STATISTICS) {
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t j = 0; j < n; ++j) {
      C below = load(z[j]) - max;
      below = below < ExpConstants<C>::lowest ? ExpConstants<C>::lowest : below;  // 0 * -inf must be 0
      const C power = exponential<C>(below);
      sum += power;
      weighted += power * below;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += exponential<C>(load(z[j]) - max);
  }
  sums.raise_max(max);
  sums.sum += double(sum);
  sums.weighted += double(weighted);
}

// Without the label. z is x, and needs no place of its own.
template <bool STATISTICS, class T>
UNLEARN_CLONED void add_plain(const T* z, int64_t n, RowSums<compute_t<T>>& sums) {
  for (int64_t start = 0; start < n; start += ROW_BLOCK) {
    prefetch_block_after_next(z + start);
    add_block<STATISTICS>(z + start, n - start < ROW_BLOCK ? n - start : ROW_BLOCK, sums);
  }
}

template <class C>
UNLEARN_CLONED double block_total(const C* z, int64_t n) {
  C total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += z[j];
  return double(total);
}

// Without the label.
template <bool STATISTICS, class T>
UNLEARN_CLONED void add_scaled(const T* x, int64_t n, Scaling<compute_t<T>> scaling, RowSums<compute_t<T>>& sums) {
  compute_t<T> z[ROW_BLOCK];
  for (int64_t start = 0; start < n; start += ROW_BLOCK) {
    const int64_t count = n - start < ROW_BLOCK ? n - start : ROW_BLOCK;
    load_block(x + start, count, scaling, z);
    if constexpr (STATISTICS) sums.total += block_total(z, count);
    add_block<STATISTICS>(z, count, sums);
  }
}

template <bool STATISTICS, class T>
void add_segment(
    const T* x, int64_t begin, int64_t end, int64_t label, Scaling<compute_t<T>> scaling, RowSums<compute_t<T>>& sums) {
  using C = compute_t<T>;
  const auto add = [&](int64_t from, int64_t to) {
    if (!STATISTICS && std::is_same_v<T, C> && scaling.plain()) {  // what is converted is better converted once
      add_plain<false>(x + from, to - from, sums);
    } else {
      add_scaled<STATISTICS>(x + from, to - from, scaling, sums);
    }
  };
  if (label < begin || label >= end) return add(begin, end);
  const int64_t start = begin + (label - begin) / ROW_BLOCK * ROW_BLOCK;
  const int64_t count = end - start < ROW_BLOCK ? end - start : ROW_BLOCK;
  C z[3 * ROW_BLOCK];  // what is fetched ahead lies in it too
  add(begin, start);
  load_block(x + start, count, scaling, z);
  if (STATISTICS) sums.total += block_total(z, count);
  sums.own = z[label - start];
  z[label - start] = -std::numeric_limits<C>::infinity();
  add_plain<STATISTICS>(z, count, sums);
  add(start + count, end);
}

template <class C>
struct RowResult {
  C logp, max, log_sum;  // log_sum = log(sum exp(z - max)) over the whole row
  C entropy, mean, hit;
};

template <class C>
RowResult<C> row_result(RowSums<C> others, int64_t V) {
  constexpr double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double own = others.own, others_max = others.max;
  const double others_over_own = (others_max - own) + std::log(others.sum);
  double logp = others_over_own > 0 ? -others_over_own - std::log1p(std::exp(-others_over_own))
                                    : -std::log1p(std::exp(others_over_own));
  double max = own > others_max ? own : others_max;
  const bool has_nan = own != own || (others.sum != others.sum && others_max != infinity);  // inf - inf is NaN as well
  if (max == infinity) logp = nan;
  others.raise_max(C(max));
  const double own_term = std::exp(own - max), sum = others.sum + own_term;
  const double log_sum = own == max && std::isfinite(max) ? std::log1p(others.sum) : std::log(sum);
  const double weighted = others.weighted + (own_term == 0 ? 0 : own_term * (own - max));
  if (has_nan) max = nan;
  return {
      C(logp),
      C(max),
      C(log_sum),
      C(log_sum - weighted / sum),
      C(others.total / double(V)),
      C(!has_nan && own >= others_max)};
}

// The cotangents of a row: of logp, of lse, of entropy, and of the mean over V.
template <class C>
struct RowCotangents {
  C logp, lse, entropy, mean_over_V;
};

template <class T>
UNLEARN_CLONED void plain_gradient_segment(
    const T* x, T* out, int64_t begin, int64_t end, int64_t label, compute_t<T> grad, RowResult<compute_t<T>> row) {
  using C = compute_t<T>;
  for (int64_t start = begin; start < end; start += ROW_BLOCK) {
    const int64_t count = end - start < ROW_BLOCK ? end - start : ROW_BLOCK;
    prefetch_blocks_after_next(x + start, out + start);
#pragma omp simd
    for (int64_t j = start; j < start + count; ++j) {
      out[j] = store<T>(-grad * exponential<C>((load(x[j]) - row.max) - row.log_sum));
    }
  }
  if (label >= begin && label < end) out[label] = store<T>(-grad * std::expm1(row.logp));
}

// dx = (p (lse - logp - entropy (log p + H)) + [label] logp + mean / V) dz/dx, named by what the cotangents are of.
template <class T>
UNLEARN_CLONED void gradient_segment(
    const T* x, T* out, int64_t begin, int64_t end, int64_t label, Scaling<compute_t<T>> scaling,
    RowCotangents<compute_t<T>> grad, RowResult<compute_t<T>> row) {
  using C = compute_t<T>;
  C z[ROW_BLOCK], slope[ROW_BLOCK], own_z, own_slope;
  const bool has_label = label >= begin && label < end;
  if (has_label) load_block_and_slope(x + label, 1, scaling, &own_z, &own_slope);  // `out` may be x
  const C every = grad.lse - grad.logp;
  for (int64_t start = begin; start < end; start += ROW_BLOCK) {
    const int64_t count = end - start < ROW_BLOCK ? end - start : ROW_BLOCK;
    T* out_block = out + start;
    prefetch_blocks_after_next(x + start, out_block);
    load_block_and_slope(x + start, count, scaling, z, slope);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      C logp = (z[j] - row.max) - row.log_sum;
      logp = logp < ExpConstants<C>::lowest ? ExpConstants<C>::lowest : logp;  // 0 * -inf must be 0
      const C dz = exponential<C>(logp) * (every - grad.entropy * (logp + row.entropy)) + grad.mean_over_V;
      out_block[j] = store<T>(dz * slope[j]);
    }
  }
  if (!has_label) return;
  const C p = std::exp(row.logp), from_entropy = p == 0 ? C(0) : grad.entropy * (row.logp + row.entropy);
  const C dz = p * (grad.lse - from_entropy) - grad.logp * std::expm1(row.logp) + grad.mean_over_V;
  out[label] = store<T>(dz * own_slope);
}

}  // namespace unlearn
