// Tensors that are walked together whatever their strides and dtypes are: a run of elements of any of them, in the
// common order of their axes, as contiguous values of one type. No torch in here.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/scalar.h"

namespace unlearn {

enum class Float { float32, float64, bfloat16, float16 };

// f(T{}) for the type that stores `dtype`.
template <class F>
auto dispatch(Float dtype, const F& f) {
  switch (dtype) {
    case Float::float32: return f(float{});
    case Float::float64: return f(double{});
    case Float::bfloat16: return f(bfloat16{});
    default: return f(float16{});
  }
}

inline int64_t width(Float dtype) {
  return dispatch(dtype, [](auto x) { return int64_t(sizeof(x)); });
}

template <class T>
constexpr Float float_of = std::is_same_v<T, float>      ? Float::float32
                           : std::is_same_v<T, double>   ? Float::float64
                           : std::is_same_v<T, bfloat16> ? Float::bfloat16
                                                         : Float::float16;

using Axes = std::vector<int64_t>;

// One of the tensors; all that are walked together have one shape, which is kept beside them.
struct Strided {
  void* data = nullptr;
  Float dtype = Float::float32;
  Axes strides;

  // Whether its elements lie in a row, in the common order.
  bool dense() const { return strides.empty() || (strides.size() == 1 && strides[0] == 1); }
};

// Drops axes of size 1 and merges axes that are one for all tensors, so that what is contiguous has one axis at most.
inline void merge_axes(Axes& shape, std::initializer_list<Strided*> tensors) {
  size_t kept = 0;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == 1) continue;
    bool merges = kept > 0;
    for (const Strided* t : tensors) merges = merges && t->strides[kept - 1] == shape[d] * t->strides[d];
    if (merges) --kept;
    shape[kept] = merges ? shape[kept] * shape[d] : shape[d];
    for (Strided* t : tensors) t->strides[kept] = t->strides[d];
    ++kept;
  }
  shape.resize(kept);
  for (Strided* t : tensors) t->strides.resize(kept);
}

// visit(offset, stride, count) for the pieces along the last axis that make up `count` elements from `start` on.
template <class Visit>
void for_each_piece(const Axes& shape, const Axes& strides, int64_t start, int64_t count, const Visit& visit) {
  if (shape.empty()) return visit(int64_t(0), int64_t(1), count);
  const int64_t inner = shape.back();
  while (count > 0) {
    int64_t row = start / inner, offset = start % inner * strides.back();
    for (size_t d = shape.size() - 1; d-- > 0; row /= shape[d]) offset += row % shape[d] * strides[d];
    const int64_t taken = std::min(count, inner - start % inner);
    visit(offset, strides.back(), taken);
    start += taken;
    count -= taken;
  }
}

template <class T, class C>
UNLEARN_CLONED void widen(const T* in, C* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = C(load(in[i]));
}

// Elements start to start + count as values of type C: where they lie, or in `buffer`.
template <class C>
const C* read(const Strided& t, const Axes& shape, int64_t start, int64_t count, C* buffer) {
  if (t.dense() && t.dtype == float_of<C>) return static_cast<const C*>(t.data) + start;
  dispatch(t.dtype, [&](auto type) {
    using T = decltype(type);
    const T* in = static_cast<const T*>(t.data);
    if (t.dense()) return widen(in + start, buffer, count);
    C* out = buffer;
    for_each_piece(shape, t.strides, start, count, [&](int64_t offset, int64_t stride, int64_t n) {
      for (int64_t i = 0; i < n; ++i) out[i] = C(load(in[offset + i * stride]));
      out += n;
    });
  });
  return buffer;
}

// The same of raw values, and back.
template <class T>
void gather(const Strided& t, const Axes& shape, int64_t start, int64_t count, T* out) {
  const T* in = static_cast<const T*>(t.data);
  for_each_piece(shape, t.strides, start, count, [&](int64_t offset, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) *out++ = in[offset + i * stride];
  });
}

template <class T>
void scatter(const Strided& t, const Axes& shape, int64_t start, int64_t count, const T* values) {
  T* out = static_cast<T*>(t.data);
  for_each_piece(shape, t.strides, start, count, [&](int64_t offset, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[offset + i * stride] = *values++;
  });
}

}  // namespace unlearn
