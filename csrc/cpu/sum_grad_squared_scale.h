// out[c] += scale * sum_b weights[b] * (sum_t g[b, t, c] * x[b, t, c])^2, the squared per-example gradients of an
// elementwise scale, or without x of a bias; and, in the same pass, the weighted sum of the gradients themselves.
//
// Fused: product, sum over positions, square, sum over examples. Reads g and x once, in the order in which they lie in
// memory: row after row where the columns are neighbours (channels last), column after column where the positions are
// (channels first).
// Work: a task is a group of examples and a range of columns; it adds in double to sums of its own. The groups depend on
// the sizes alone and are added in order, so that the result does not depend on the number of threads.
#pragma once

#include "cpu/moments.h"

namespace unlearn {

constexpr int64_t RUN = 512;  // positions that are summed in the computing type before double takes over

template <class T>
struct ScaleProblem {
  Strided<T> g, x;  // [B, T, C]; x.data is null for a bias
  int64_t T_;
  const compute_t<T>* weights;  // [B], or null
  double scale;

  UNLEARN_INLINE double weight(int64_t b) const { return weights ? scale * double(weights[b]) : scale; }
};

// g * x, or g, along one axis. UNIT: the strides are 1.
template <bool UNIT, bool X, class T>
struct Products {
  const T *g, *x;
  int64_t g_stride, x_stride;

  UNLEARN_INLINE compute_t<T> operator()(int64_t i) const {
    const compute_t<T> value = load(g[UNIT ? i : i * g_stride]);
    if constexpr (X) return value * load(x[UNIT ? i : i * x_stride]);
    return value;
  }

  UNLEARN_INLINE void prefetch(int64_t i) const {
    if constexpr (UNIT) unlearn::prefetch(g + i, STRIP * sizeof(T));
    if constexpr (UNIT && X) unlearn::prefetch(x + i, STRIP * sizeof(T));
  }
};

// Examples b0 to b1, columns c0 to c0 + columns, row after row.
template <bool UNIT, bool X, class T>
UNLEARN_CLONED void scale_rows(
    const ScaleProblem<T>& q, int64_t b0, int64_t b1, int64_t c0, int64_t columns, const RowMoments<double>& moments) {
  Scratch<compute_t<T>> scratch;
  for (int64_t b = b0; b < b1; ++b) {
    const T* g = q.g.data + b * q.g.stride_b + c0 * q.g.stride_c;
    const T* x = X ? q.x.data + b * q.x.stride_b + c0 * q.x.stride_c : nullptr;
    const auto rows = [&](int64_t t) __attribute__((always_inline)) {
      return Products<UNIT, X, T>{g + t * q.g.stride_t, X ? x + t * q.x.stride_t : nullptr, q.g.stride_c, q.x.stride_c};
    };
    if (q.T_ == 1) {
      moments.add(rows(0), columns, q.weight(b));
    } else {
      add_example(rows, q.T_, columns, moments, q.weight(b), scratch);
    }
  }
}

// The same, column after column; the positions lie side by side.
template <bool X, class T>
UNLEARN_CLONED void scale_runs(
    const ScaleProblem<T>& q, int64_t b0, int64_t b1, int64_t c0, int64_t columns, const RowMoments<double>& moments) {
  using C = compute_t<T>;
  double gradient[COLUMNS];
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t c = 0; c < columns; ++c) {
      const T* g = q.g.data + b * q.g.stride_b + (c0 + c) * q.g.stride_c;
      const T* x = X ? q.x.data + b * q.x.stride_b + (c0 + c) * q.x.stride_c : nullptr;
      const Products<true, X, T> products{g, x, 1, 1};
      double total = 0;
      for (int64_t t0 = 0; t0 < q.T_; t0 += RUN) {
        const int64_t t1 = std::min(q.T_, t0 + RUN);
        C part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t t = t0; t < t1; ++t) part += products(t);
        total += part;
      }
      gradient[c] = total;
    }
    moments.add([&](int64_t c) __attribute__((always_inline)) { return gradient[c]; }, columns, q.weight(b));
  }
}

template <bool X, class T>
void scale_task(
    const ScaleProblem<T>& q, int64_t b0, int64_t b1, int64_t c0, int64_t columns, const RowMoments<double>& moments) {
  if (q.g.stride_c == 1 && (!X || q.x.stride_c == 1)) return scale_rows<true, X>(q, b0, b1, c0, columns, moments);
  if (q.g.stride_t == 1 && (!X || q.x.stride_t == 1)) return scale_runs<X>(q, b0, b1, c0, columns, moments);
  return scale_rows<false, X>(q, b0, b1, c0, columns, moments);
}

}  // namespace unlearn
