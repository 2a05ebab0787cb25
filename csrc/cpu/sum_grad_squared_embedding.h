// out[v, h] += scale * sum_b weights[b] * (sum_{t: tokens[b, t] = v} g[b, t, h])^2, the squared per-example gradients of
// an embedding table; and, in the same pass, the weighted sum of the gradients themselves.
//
// Fused: the sum over an example's repetitions of a token, square, sum over examples. Reads g once, and reads and writes
// once the rows of out that occur; beyond that memory holds two indices a token.
// Work: the tokens are ordered by row of out, within a row by example; a task is a range of this order and of columns, and
// takes the rows that begin in its range. A row belongs to one task, and its examples are added in order, so that the
// result does not depend on the number of threads.
#pragma once

#include <vector>

#include "cpu/moments.h"

namespace unlearn {

template <class T>
struct EmbeddingProblem {
  Strided<T> g;           // [B, T, H]
  const int64_t* tokens;  // [B, T]
  int64_t T_;
  const compute_t<T>* weights;  // [B], or null
  double scale;
  const int64_t* order;  // the places of the tokens that count, by token, then by place
  int64_t count;         // of them
};

// The places of tokens >= 0, ordered by token, then by place: a radix sort, whose passes keep the order of equal digits.
inline std::vector<int64_t> order_by_token(const int64_t* tokens, int64_t N, int64_t V) {
  constexpr int BITS = 11;
  std::vector<int64_t> order, sorted;
  order.reserve(N);
  for (int64_t n = 0; n < N; ++n) {
    if (tokens[n] >= 0) order.push_back(n);
  }
  sorted.resize(order.size());
  for (int shift = 0; shift < 63 && (V - 1) >> shift > 0; shift += BITS) {
    int64_t starts[(1 << BITS) + 1] = {};
    const auto digit = [&](int64_t n) { return tokens[n] >> shift & ((1 << BITS) - 1); };
    for (int64_t n : order) ++starts[digit(n) + 1];
    for (int i = 0; i < 1 << BITS; ++i) starts[i + 1] += starts[i];
    for (int64_t n : order) sorted[starts[digit(n)]++] = n;
    order.swap(sorted);
  }
  return order;
}

// UNIT: the columns of g are neighbours.
template <bool UNIT, class T>
struct Row {
  const T* data;
  int64_t stride;

  UNLEARN_INLINE compute_t<T> operator()(int64_t c) const { return load(data[UNIT ? c : c * stride]); }
  UNLEARN_INLINE void prefetch(int64_t c) const {
    if constexpr (UNIT) prefetch_strip(data + c);
  }
};

// Starts to fetch a row that is needed soon, which the hardware cannot foresee; it fetches the rest by itself.
UNLEARN_INLINE void prefetch_row(const void* row) {
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < 512; byte += 64) __builtin_prefetch(static_cast<const char*>(row) + byte);
}

// The rows of out that begin at places `begin` to `end` of the order, columns c0 to c0 + columns.
template <bool UNIT, class T>
UNLEARN_CLONED void embedding_rows(
    const EmbeddingProblem<T>& q, int64_t begin, int64_t end, int64_t c0, int64_t columns,
    const Moments<compute_t<T>>& out, int64_t out_row, int64_t first_row) {
  Scratch<compute_t<T>> scratch;
  const auto token = [&](int64_t i) { return q.tokens[q.order[i]]; };
  int64_t i = begin;
  while (i > 0 && i < end && token(i) == token(i - 1)) ++i;  // the task before takes this row
  while (i < end) {
    const int64_t v = token(i);
    const auto moments = out.at(v * out_row + c0 * out.out_stride, v * first_row + c0 * out.first_stride);
    do {
      const int64_t b = q.order[i] / q.T_, next = (b + 1) * q.T_;
      int64_t n = 1;
      while (i + n < q.count && q.order[i + n] < next && token(i + n) == v) ++n;
      const T* g = q.g.data + b * q.g.stride_b + c0 * q.g.stride_c;
      const int64_t* places = q.order + i;
      const auto rows = [&](int64_t k) __attribute__((always_inline)) {
        return Row<UNIT, T>{g + (places[k] - b * q.T_) * q.g.stride_t, q.g.stride_c};
      };
      if (i + n < q.count) {
        const int64_t place = q.order[i + n];
        prefetch_row(q.g.data + place / q.T_ * q.g.stride_b + place % q.T_ * q.g.stride_t + c0 * q.g.stride_c);
        if (q.tokens[place] != v) prefetch_row(out.out + q.tokens[place] * out_row + c0 * out.out_stride);
      }
      add_example(rows, n, columns, moments, q.weights ? q.scale * double(q.weights[b]) : q.scale, scratch);
      i += n;
    } while (i < q.count && token(i) == v);
  }
}

}  // namespace unlearn
