// out[v, h] += scale * sum_b weights[b] * (sum_{t: tokens[b, t] = v} g[b, t, h])^2, the squared per-example gradients of
// an embedding table; and, in the same pass, the weighted sum of the gradients themselves.
//
// Fused: the sum over an example's repetitions of a token, square, sum over examples. Reads g once, and reads and writes
// once the rows of out that occur; beyond that memory holds two numbers a token.
// Work: the tokens are ordered by row of out, within a row by example; a task is a range of this order and of columns, and
// takes the rows that begin in its range. A row belongs to one task, and its examples are added in order, so that the
// result does not depend on the number of threads.
#pragma once

#include <utility>
#include <vector>

#include "cpu/moments.h"

namespace unlearn {

// The places of tokens >= 0, ordered by token, then by place, and where their rows of g lie.
struct Order {
  std::vector<int64_t> places, offsets;
};

template <class T>
struct EmbeddingProblem {
  Strided<T> g;           // [B, T, H]
  const int64_t* tokens;  // [B, T]
  int64_t T_;
  const compute_t<T>* weights;  // [B], or null
  double scale;
  const int64_t *places, *offsets;  // of an Order
  int64_t count;
};

// A radix sort, whose passes keep the order of equal digits.
template <class T>
Order order_by_token(const int64_t* tokens, int64_t N, int64_t T_, int64_t V, const Strided<T>& g) {
  constexpr int BITS = 11;
  std::vector<int64_t> places, sorted;
  places.reserve(N);
  for (int64_t n = 0; n < N; ++n) {
    if (tokens[n] >= 0) places.push_back(n);
  }
  sorted.resize(places.size());
  for (int shift = 0; shift < 63 && (V - 1) >> shift > 0; shift += BITS) {
    int64_t starts[(1 << BITS) + 1] = {};
    const auto digit = [&](int64_t n) { return tokens[n] >> shift & ((1 << BITS) - 1); };
    for (int64_t n : places) ++starts[digit(n) + 1];
    for (int i = 0; i < 1 << BITS; ++i) starts[i + 1] += starts[i];
    for (int64_t n : places) sorted[starts[digit(n)]++] = n;
    places.swap(sorted);
  }
  for (size_t i = 0; i < places.size(); ++i) sorted[i] = places[i] / T_ * g.stride_b + places[i] % T_ * g.stride_t;
  return {std::move(places), std::move(sorted)};
}

// UNIT: the columns of g are neighbours.
template <bool UNIT, class T>
struct Row {
  const T* data;
  int64_t stride;

  UNLEARN_INLINE compute_t<T> operator()(int64_t c) const { return load(data[UNIT ? c : c * stride]); }
  UNLEARN_INLINE void prefetch(int64_t c) const {
    if constexpr (UNIT) unlearn::prefetch(data + c, STRIP * sizeof(T));
  }
};

// Whether C holds the weight with all its digits. If not, the example is added in double.
template <class C>
bool ordinary(double weight) {
  const double magnitude = std::abs(weight);
  return magnitude >= std::numeric_limits<C>::min() && magnitude <= std::numeric_limits<C>::max();
}

// The rows of out that begin at places `begin` to `end` of the order, columns c0 to c0 + columns.
template <bool UNIT, class T>
UNLEARN_CLONED void embedding_rows(
    const EmbeddingProblem<T>& q, int64_t begin, int64_t end, int64_t c0, int64_t columns,
    const RowMoments<compute_t<T>>& out, int64_t out_row, int64_t first_row) {
  using C = compute_t<T>;
  Scratch<C> scratch;
  const T* g = q.g.data + c0 * q.g.stride_c;
  const auto token = [&](int64_t i) { return q.tokens[q.places[i]]; };
  int64_t i = begin;
  while (i > 0 && i < end && token(i) == token(i - 1)) ++i;  // the task before takes this row
  while (i < end) {
    const int64_t v = token(i);
    const auto moments = out.at(v * out_row + c0 * out.out_stride, v * first_row + c0 * out.first_stride);
    if (out.out_stride == 1) prefetch(moments.out, columns * sizeof(C));
    if (out.first && out.first_stride == 1) prefetch(moments.first, columns * sizeof(C));
    do {
      const int64_t b = q.places[i] / q.T_, next_example = (b + 1) * q.T_;
      int64_t n = 1;
      while (i + n < q.count && q.places[i + n] < next_example && token(i + n) == v) ++n;
      const auto rows = [&](int64_t k) __attribute__((always_inline)) {
        return Row<UNIT, T>{g + q.offsets[std::min(i + k, q.count - 1)], q.g.stride_c};
      };
      const double weight = q.weights ? q.scale * double(q.weights[b]) : q.scale;
      if (!ordinary<C>(weight)) {
        add_example(rows, n, columns, moments, weight, scratch);
      } else if (n > 1) {
        add_example(rows, n, columns, moments, C(weight), scratch);
      } else {  // the most common case
        if (UNIT)
          prefetch(rows(1).data, std::min<int64_t>(columns * sizeof(T), 512));  // the hardware foresees the rest
        moments.add(rows(0), columns, C(weight));
      }
      i += n;
    } while (i < q.count && token(i) == v);
  }
}

}  // namespace unlearn
