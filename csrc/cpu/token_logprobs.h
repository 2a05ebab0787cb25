// One row of token log-probabilities.
//
// Forward, fused: maximum, sum of exponentials and the label's log-probability. Reads the row once: a block stays in
// the first-level cache between its maximum and its sum. The label's own term is kept out of the sum, so that
// log p = -log1p(sum of the others / own) keeps its relative precision as p -> 1.
// Backward, fused: softmax from the saved maximum and log-sum, minus one-hot, times the row's cotangent. Reads the row
// once and writes it once; `out` may be the row itself.
// Work: one row a call; rows are spread over threads by the caller.
#pragma once

#include <cmath>

#include "cpu/exp.h"

namespace unlearn {

constexpr int64_t ROW_BLOCK = 512;  // elements; what is read two blocks later is fetched meanwhile

// The sum is in double: it collects float block sums, up to V / ROW_BLOCK of them.
template <class C>
struct RunningSum {
  C max = -std::numeric_limits<C>::infinity();
  double sum = 0;  // sum of exp(x - max)
};

template <class T>
UNLEARN_CLONED void add_to_sum(const T* x, int64_t n, RunningSum<compute_t<T>>& running) {
  using C = compute_t<T>;
  constexpr C lowest = -std::numeric_limits<C>::infinity();
  for (int64_t start = 0; start < n; start += ROW_BLOCK) {
    const T* block = x + start;
    const int64_t count = n - start < ROW_BLOCK ? n - start : ROW_BLOCK;
    for (int64_t line = 0; line < int64_t(ROW_BLOCK * sizeof(T)); line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(block + 2 * ROW_BLOCK) + line, 0, 3);
    }
    C block_max = running.max;
#pragma omp simd reduction(max : block_max)
    for (int64_t j = 0; j < count; ++j) {
      const C value = load(block[j]);
      block_max = value > block_max ? value : block_max;
    }
    if (block_max == lowest) {  // -inf adds nothing, and -inf - -inf must not reach the sum; NaN must
      for (int64_t j = 0; j < count; ++j) running.sum += load(block[j]) != load(block[j]) ? load(block[j]) : C(0);
      continue;
    }
    C block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t j = 0; j < count; ++j) block_sum += exponential<C>(load(block[j]) - block_max);
    if (block_max > running.max) {
      running.sum *= std::exp(double(running.max) - double(block_max));
      running.max = block_max;
    }
    running.sum += double(block_sum);
  }
}

template <class C>
struct RowResult {
  C logp, max, log_sum;  // log_sum = log(sum exp(x - max)) over the whole row
};

template <class T>
RowResult<compute_t<T>> logprob_row(const T* x, int64_t V, int64_t label) {
  using C = compute_t<T>;
  RunningSum<C> others;
  add_to_sum(x, label, others);
  add_to_sum(x + label + 1, V - label - 1, others);
  const double own = load(x[label]);
  const double max = own > others.max ? own : double(others.max);
  const double others_over_own = (double(others.max) - own) + std::log(others.sum);
  double logp = others_over_own > 0 ? -others_over_own - std::log1p(std::exp(-others_over_own))
                                    : -std::log1p(std::exp(others_over_own));
  if (max == std::numeric_limits<double>::infinity()) logp = std::numeric_limits<double>::quiet_NaN();
  const double sum = others.sum * std::exp(double(others.max) - max) + std::exp(own - max);
  return {C(logp), C(max), C(std::log(sum))};
}

template <class T>
UNLEARN_CLONED void logprob_row_backward(
    const T* x, T* out, int64_t V, int64_t label, compute_t<T> grad, RowResult<compute_t<T>> row) {
  using C = compute_t<T>;
  for (int64_t start = 0; start < V; start += ROW_BLOCK) {
    const int64_t count = V - start < ROW_BLOCK ? V - start : ROW_BLOCK;
    for (int64_t line = 0; line < int64_t(ROW_BLOCK * sizeof(T)); line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + start + 2 * ROW_BLOCK) + line, 0, 3);
      __builtin_prefetch(reinterpret_cast<const char*>(out + start + 2 * ROW_BLOCK) + line, 1, 3);
    }
#pragma omp simd
    for (int64_t j = start; j < start + count; ++j) {
      out[j] = store<T>(-grad * exponential<C>((load(x[j]) - row.max) - row.log_sum));
    }
  }
  out[label] = store<T>(-grad * std::expm1(row.logp));
}

}  // namespace unlearn
