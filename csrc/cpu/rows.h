// What the operators over rows of logits share: a row in blocks that stay in the first-level cache, and the logits as
// the softmax sees them, z = cap(x) / temperature with cap(x) = softcap * tanh(x / softcap), or x where softcap is 0.
#pragma once

#include <cmath>

#include "cpu/exp.h"

namespace unlearn {

constexpr int64_t ROW_BLOCK = 512;  // elements; what is read two blocks later is fetched meanwhile
// Elements that one thread takes of a row. Sums are merged segment by segment whatever the number of threads is, so that
// it does not change their bits.
constexpr int64_t SEGMENT = 32 * ROW_BLOCK;

template <class T>
UNLEARN_INLINE void prefetch_block_after_next(const T* block) {
  for (int64_t line = 0; line < int64_t(ROW_BLOCK * sizeof(T)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(block + 2 * ROW_BLOCK) + line, 0, 3);
  }
}

// Of what is read and of what is written, line by line: where they are one, the second costs less than apart.
template <class T>
UNLEARN_INLINE void prefetch_blocks_after_next(const T* in, T* out) {
  for (int64_t line = 0; line < int64_t(ROW_BLOCK * sizeof(T)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(in + 2 * ROW_BLOCK) + line, 0, 3);
    __builtin_prefetch(reinterpret_cast<const char*>(out + 2 * ROW_BLOCK) + line, 1, 3);
  }
}

template <class C>
struct Scaling {
  C softcap, top, inverse_temperature;  // top = softcap / temperature, the largest z

  Scaling(double softcap, double temperature)
      : softcap(C(softcap)), top(C(softcap / temperature)), inverse_temperature(C(1 / temperature)) {}
  bool plain() const { return softcap == 0 && inverse_temperature == 1; }
};

// x / softcap, where hyperbolic_tangent takes it.
template <class T, class C>
UNLEARN_INLINE void load_clamped(const T* x, int64_t n, C softcap, C* u) {
  constexpr C limit = ExpConstants<C>::lowest / C(-2);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const C ratio = C(load(x[j])) / softcap, above = ratio < -limit ? -limit : ratio;
    u[j] = above > limit ? limit : above;
  }
}

// z of a block. A function of its own, and without a label: a condition on what does not change from block to block is
// hoisted out of the loop over blocks, or splits it, and the compiler's copy of that loop loses its `omp simd`.
template <class T, class C>
UNLEARN_CLONED void load_block(const T* x, int64_t n, Scaling<C> scaling, C* z) {
  prefetch_block_after_next(x);
  if (scaling.softcap == 0) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] = C(load(x[j])) * scaling.inverse_temperature;
  } else {
    load_clamped(x, n, scaling.softcap, z);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) z[j] = hyperbolic_tangent(z[j]).value * scaling.top;
  }
}

// z of a block, and dz/dx.
template <class T, class C>
UNLEARN_CLONED void load_block_and_slope(const T* x, int64_t n, Scaling<C> scaling, C* z, C* slope) {
  if (scaling.softcap == 0) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      z[j] = C(load(x[j])) * scaling.inverse_temperature;
      slope[j] = scaling.inverse_temperature;
    }
  } else {
    load_clamped(x, n, scaling.softcap, z);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const Tanh<C> tanh = hyperbolic_tangent(z[j]);
      z[j] = tanh.value * scaling.top;
      slope[j] = tanh.slope * scaling.inverse_temperature;
    }
  }
}

}  // namespace unlearn
