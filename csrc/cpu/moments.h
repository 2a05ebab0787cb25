// What the squared per-example gradients of an embedding and of an elementwise scale share: an example's gradient is a
// sum of rows, and its square, weighted, is added to a row of the output.
//
// Short runs of rows are summed in the computing type, and their sums in double: the error hardly grows with the number
// of rows.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/scalar.h"

namespace unlearn {

constexpr int64_t COLUMNS = 4096;  // summed together at most
constexpr int64_t STRIP = 64;      // columns that are fetched together
constexpr int64_t AHEAD = 256;     // columns between fetching and adding

// A [B, T, columns] operand with any strides.
template <class T>
struct Strided {
  const T* data;
  int64_t stride_b, stride_t, stride_c;
};

// A row of the output, and, where `first` is given, of the sum of gradients. A gradient is a function of the column.
template <class O>
struct RowMoments {
  O* out;
  int64_t out_stride;
  O* first;
  int64_t first_stride;
  bool absolute;

  RowMoments at(int64_t out_offset, int64_t first_offset) const {
    return {out + out_offset, out_stride, first ? first + first_offset : nullptr, first_stride, absolute};
  }

  // Computes in W, the type of the weight.
  template <class Gradient, class W>
  UNLEARN_INLINE void add(const Gradient& gradient, int64_t columns, W weight) const {
    if (absolute) {
      add_terms<W>(out, out_stride, columns, [&](int64_t c) __attribute__((always_inline)) {
        return weight * std::abs(W(gradient(c)));
      });
    } else {
      add_terms<W>(out, out_stride, columns, [&](int64_t c) __attribute__((always_inline)) {
        const W g = W(gradient(c));
        return weight * g * g;  // in this order: what is left of an ordinary result has not been too large or small
      });
    }
    if (first == nullptr) return;
    add_terms<W>(first, first_stride, columns, [&](int64_t c) __attribute__((always_inline)) {
      return weight * W(gradient(c));
    });
  }

 private:
  template <class W, class Term>
  static UNLEARN_INLINE void add_terms(O* target, int64_t stride, int64_t columns, const Term& term) {
    if (stride == 1) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) target[c] = O(W(target[c]) + term(c));
    } else {
      for (int64_t c = 0; c < columns; ++c) target[c * stride] = O(W(target[c * stride]) + term(c));
    }
  }
};

// Starts to fetch the 64-byte lines of `bytes` bytes. Only a hint: beyond the end of memory it does nothing.
UNLEARN_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(data) + byte);
}

// How many of n rows are summed in the computing type. Where that is double too, as many as there are such sums.
template <class C>
int64_t rows_of_part(int64_t n) {
  constexpr int64_t ROWS = 32;
  return sizeof(C) == sizeof(double) ? std::max(ROWS, int64_t(std::sqrt(double(n)))) : ROWS;
}

template <class C>
struct Scratch {
  alignas(64) C part[COLUMNS];
  alignas(64) double total[COLUMNS];
};

// part[c] = the sum of rows(k)(c) over begin <= k < end, one row after the other, which is how memory likes to be read. It
// is fetched AHEAD columns before its turn, in the next rows too: the hardware alone does not keep up.
template <class Rows, class C>
UNLEARN_INLINE void sum_rows(const Rows& rows, int64_t begin, int64_t end, int64_t columns, C* part) {
  std::fill(part, part + columns, C(0));
  const int64_t rows_ahead = AHEAD / columns, columns_ahead = AHEAD % columns;
  for (int64_t k = begin; k < end; ++k) {
    const auto row = rows(k), soon = rows(k + rows_ahead), later = rows(k + rows_ahead + 1);
    int64_t c0 = 0;
    for (; c0 + STRIP <= columns; c0 += STRIP) {
      if (c0 + columns_ahead < columns) {
        soon.prefetch(c0 + columns_ahead);
      } else {
        later.prefetch(c0 + columns_ahead - columns);
      }
#pragma omp simd
      for (int64_t c = c0; c < c0 + STRIP; ++c) part[c] += row(c);
    }
#pragma omp simd
    for (int64_t c = c0; c < columns; ++c) part[c] += row(c);
  }
}

// Adds the moments of one example, whose gradient is the sum of rows(0) to rows(n - 1), n > 0. rows(k) is a function of
// the column; rows beyond n are only fetched ahead.
template <class Rows, class C, class O, class W>
UNLEARN_INLINE void add_example(
    const Rows& rows, int64_t n, int64_t columns, const RowMoments<O>& moments, W weight, Scratch<C>& scratch) {
  C* part = scratch.part;
  double* total = scratch.total;
  const int64_t step = rows_of_part<C>(n);
  sum_rows(rows, 0, std::min(n, step), columns, part);
  if (n <= step) {
    return moments.add([part](int64_t c) __attribute__((always_inline)) { return part[c]; }, columns, weight);
  }
  std::copy(part, part + columns, total);
  for (int64_t k = step; k < n; k += step) {
    sum_rows(rows, k, std::min(n, k + step), columns, part);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) total[c] += part[c];
  }
  moments.add([total](int64_t c) __attribute__((always_inline)) { return total[c]; }, columns, weight);
}

}  // namespace unlearn
