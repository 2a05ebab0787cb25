// A segment of a row of KL divergences from a teacher's distribution q to the model's p.
//
// Forward, fused: both maxima, both sums of exponentials and sum q (log q - log p). Reads both segments once, block by
// block, into the first-level cache. Backward, fused: p - q from the saved maxima and log-sums, times the row's
// cotangent; reads both segments once and writes one, which may be the logits'.
// Work: one segment a call; segments are spread over threads by the caller, which merges a row's sums in their order.
// The teacher has a dtype of its own, so blocks are read through pointers that know theirs.
#pragma once

#include "cpu/rows.h"

namespace unlearn {

enum class Element { f32, f64, bf16, f16 };

template <class C>
struct KlRow {
  const void* data;
  Element element;
  int64_t label;
  C penalty;  // taken from the label's z
};

// z of a block. Not inlined, for load_block's reason.
template <class C>
__attribute__((noinline)) void load_kl_block(const KlRow<C>& row, int64_t start, int64_t n, Scaling<C> scaling, C* z) {
  switch (row.element) {
    case Element::f32: load_block(static_cast<const float*>(row.data) + start, n, scaling, z); break;
    case Element::f64: load_block(static_cast<const double*>(row.data) + start, n, scaling, z); break;
    case Element::bf16: load_block(static_cast<const bfloat16*>(row.data) + start, n, scaling, z); break;
    case Element::f16: load_block(static_cast<const float16*>(row.data) + start, n, scaling, z); break;
  }
  if (row.label >= start && row.label < start + n) z[row.label - start] -= row.penalty;
}

template <class C>
struct KlSums {
  C max = -std::numeric_limits<C>::infinity(), teacher_max = max;
  double sum = 0, teacher_sum = 0;  // of exp(z - max), for either
  double cross = 0;                 // sum of exp(w - teacher_max) * ((w - teacher_max) - (z - max)), w the teacher's z

  // A row that has only -inf so far is measured from 0.
  static C origin(C max) { return max == -std::numeric_limits<C>::infinity() ? C(0) : max; }

  void raise_max(C to, C teacher_to) {
    const double down = double(origin(max)) - double(origin(to > max ? to : max));
    const double teacher_down = double(teacher_max) - double(teacher_to);
    if (to > max) {
      if (sum != 0) sum *= std::exp(double(max) - double(to));
      max = to;
    }
    if (teacher_sum == 0) {
      teacher_max = teacher_to > teacher_max ? teacher_to : teacher_max;
    } else if (teacher_to > teacher_max) {
      const double factor = std::exp(teacher_down);
      cross = factor == 0 ? teacher_sum * 0 : (cross + teacher_sum * (teacher_down - down)) * factor;
      teacher_sum *= factor;
      teacher_max = teacher_to;
    } else {
      cross -= teacher_sum * down;
    }
  }
  void merge(KlSums next) {
    next.raise_max(max, teacher_max);
    raise_max(next.max, next.teacher_max);
    sum += next.sum;
    teacher_sum += next.teacher_sum;
    cross += next.cross;
  }
};

template <class C>
UNLEARN_CLONED void add_kl_segment(
    const KlRow<C>& row, const KlRow<C>& teacher, int64_t begin, int64_t end, Scaling<C> scaling, KlSums<C>& sums) {
  C z[ROW_BLOCK], w[ROW_BLOCK];
  for (int64_t start = begin; start < end; start += ROW_BLOCK) {
    const int64_t count = end - start < ROW_BLOCK ? end - start : ROW_BLOCK;
    load_kl_block(row, start, count, scaling, z);
    load_kl_block(teacher, start, count, scaling, w);
    C max = sums.max, teacher_max = sums.teacher_max;
#pragma omp simd reduction(max : max, teacher_max)
    for (int64_t j = 0; j < count; ++j) {
      max = z[j] > max ? z[j] : max;
      teacher_max = w[j] > teacher_max ? w[j] : teacher_max;
    }
    const C origin = KlSums<C>::origin(max), teacher_origin = KlSums<C>::origin(teacher_max);
    C sum = 0, teacher_sum = 0, cross = 0;
#pragma omp simd reduction(+ : sum, teacher_sum, cross)
    for (int64_t j = 0; j < count; ++j) {
      const C below = z[j] - origin, teacher_below = w[j] - teacher_origin;
      const C q = exponential<C>(teacher_below), term = q * (teacher_below - below);
      sum += exponential<C>(below);
      teacher_sum += q;
      cross += q == 0 ? C(0) : term;  // q = 0 adds nothing, whatever p is
    }
    sums.raise_max(max, teacher_max);
    sums.sum += double(sum);
    sums.teacher_sum += double(teacher_sum);
    sums.cross += double(cross);
  }
}

template <class C>
struct KlResult {
  C kl, max, log_sum, teacher_max, teacher_log_sum;
};

template <class C>
KlResult<C> kl_result(const KlSums<C>& s) {
  const double log_sum = std::log(s.sum), teacher_log_sum = std::log(s.teacher_sum);
  return {
      C(s.cross / s.teacher_sum + (log_sum - teacher_log_sum)), s.max, C(log_sum), s.teacher_max, C(teacher_log_sum)};
}

// T is the logits' type.
template <class T>
UNLEARN_CLONED void kl_gradient_segment(
    const T* x, const KlRow<compute_t<T>>& teacher, T* out, int64_t begin, int64_t end, Scaling<compute_t<T>> scaling,
    compute_t<T> grad, KlResult<compute_t<T>> saved) {
  using C = compute_t<T>;
  C z[ROW_BLOCK], w[ROW_BLOCK], slope[ROW_BLOCK];
  for (int64_t start = begin; start < end; start += ROW_BLOCK) {
    const int64_t count = end - start < ROW_BLOCK ? end - start : ROW_BLOCK;
    T* out_block = out + start;
    prefetch_blocks_after_next(x + start, out_block);
    load_block_and_slope(x + start, count, scaling, z, slope);
    load_kl_block(teacher, start, count, scaling, w);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const C p = exponential<C>((z[j] - saved.max) - saved.log_sum);
      const C q = exponential<C>((w[j] - saved.teacher_max) - saved.teacher_log_sum);
      out_block[j] = store<T>(grad * (p - q) * slope[j]);
    }
  }
}

}  // namespace unlearn
