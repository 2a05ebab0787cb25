// What the squared per-example gradients of an embedding and of an elementwise scale share: an example's gradient is a
// sum of rows, and its square, weighted, is added to a row of the output.
//
// At most ROWS rows are summed in the computing type, and their sums in double: the error does not grow with the number
// of rows, and no square overflows or vanishes for which the result has room.
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
struct Moments {
  O* out;
  int64_t out_stride;
  O* first;
  int64_t first_stride;
  bool absolute;

  Moments at(int64_t out_offset, int64_t first_offset) const {
    return {out + out_offset, out_stride, first ? first + first_offset : nullptr, first_stride, absolute};
  }

  template <class Gradient>
  UNLEARN_INLINE void add(const Gradient& gradient, int64_t columns, double weight) const {
    if (absolute) {
      add_terms(out, out_stride, columns, [&](int64_t c) __attribute__((always_inline)) {
        return weight * std::abs(double(gradient(c)));
      });
    } else {
      add_terms(out, out_stride, columns, [&](int64_t c) __attribute__((always_inline)) {
        const double g = double(gradient(c));
        return weight * g * g;
      });
    }
    if (first == nullptr) return;
    add_terms(first, first_stride, columns, [&](int64_t c) __attribute__((always_inline)) {
      return weight * double(gradient(c));
    });
  }

 private:
  template <class Term>
  static UNLEARN_INLINE void add_terms(O* target, int64_t stride, int64_t columns, const Term& term) {
    if (stride == 1) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) target[c] = O(target[c] + term(c));
    } else {
      for (int64_t c = 0; c < columns; ++c) target[c * stride] = O(target[c * stride] + term(c));
    }
  }
};

// Starts to fetch the 64-byte lines of `bytes` bytes. Only a hint: beyond the end of memory it does nothing.
UNLEARN_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(data) + byte);
}

// Rows that are summed in the computing type; more where it is double, which is what sums their sums.
template <class C>
constexpr int64_t ROWS = sizeof(C) == sizeof(double) ? 128 : 32;

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
template <class Rows, class C, class O>
UNLEARN_INLINE void add_example(
    const Rows& rows, int64_t n, int64_t columns, const Moments<O>& moments, double weight, Scratch<C>& scratch) {
  C* part = scratch.part;
  double* total = scratch.total;
  sum_rows(rows, 0, std::min(n, ROWS<C>), columns, part);
  if (n <= ROWS<C>) {
    return moments.add([part](int64_t c) __attribute__((always_inline)) { return part[c]; }, columns, weight);
  }
  std::copy(part, part + columns, total);
  for (int64_t k = ROWS<C>; k < n; k += ROWS<C>) {
    sum_rows(rows, k, std::min(n, k + ROWS<C>), columns, part);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) total[c] += part[c];
  }
  moments.add([total](int64_t c) __attribute__((always_inline)) { return total[c]; }, columns, weight);
}

}  // namespace unlearn
