// out[o, i] += scale * sum_b (sum_t g[b, t, o] * a[b, t, i])^2, the squared per-example gradients of a linear layer.
//
// Fused: per-example matrix product, square, sum over examples; nothing of size [B, O, I] exists. Reads g and a once for
// every tile of the output that needs them, writes out once.
// Work: one output tile a task, tiles over threads. The examples stream past a tile: their g and a are packed into
// cache-sized panels (converting to the computing type), a register micro-tile multiplies, and its epilogue squares
// into the tile's running sum. One position an example (T = 1) is the plain product of squares: the examples then take
// the place of positions, and the square moves into the packing.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/scalar.h"

namespace unlearn {

constexpr int64_t TILE_O = 96, TILE_I = 256;  // output tile, at most; its running sum is 96 KiB in float
constexpr int64_t TILE_T = 256;               // positions packed at a time

// A [B, T, C] operand with any strides.
template <class T>
struct Operand {
  const T* data;
  int64_t stride_b, stride_t, stride_c;
};

template <class T>
struct SquaresProblem {
  compute_t<T>* out;  // [O, I], contiguous
  Operand<T> a, g;    // inputs [B, T, I], grad_outputs [B, T, O]
  int64_t B, T_, O, I;
  double scale;
  // Where factors are squared before their product: powers of two that bring each column of a and g near 1, so that the
  // squares of large and small factors neither overflow nor vanish.
  const compute_t<T>*a_scale = nullptr, *g_scale = nullptr;
};

// For each column over T positions, the power of two that brings its largest magnitude near 1; 1 where that is 0 or not
// finite.
template <class T>
UNLEARN_CLONED void column_scales(const Operand<T>& x, int64_t T_, int64_t columns, compute_t<T>* scales) {
  using C = compute_t<T>;
  std::fill(scales, scales + columns, C(0));
  for (int64_t t = 0; t < T_; ++t) {
    const T* row = x.data + t * x.stride_t;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const C value = load(row[c * x.stride_c]), magnitude = value < 0 ? -value : value;
      scales[c] = magnitude > scales[c] ? magnitude : scales[c];
    }
  }
  const int limit = std::numeric_limits<C>::max_exponent - 2;  // its inverse must be finite too
  for (int64_t c = 0; c < columns; ++c) {
    const bool ordinary = scales[c] > 0 && is_finite(scales[c]);
    scales[c] = ordinary ? std::ldexp(C(1), -std::clamp(std::ilogb(scales[c]), -limit, limit)) : C(1);
  }
}

// Panels are padded to whole strips, at most 64 columns more than a tile. All are aligned to vectors.
template <class C>
class Workspace {
  static constexpr int64_t A = TILE_T * (TILE_I + 64), G = TILE_T * (TILE_O + 64), SUM = (TILE_O + 64) * (TILE_I + 64);
  std::unique_ptr<C[]> memory_{new C[A + G + 2 * SUM + 64 / sizeof(C)]};

 public:
  C* a = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  C *g = a + A, *product = g + G, *sum = product + SUM;
};

// Packs T positions of `count` columns into strips of `width` columns: panel[strip][t][column], zeros beyond the last
// column. Positions go outermost, so that memory is read in its own order. With SQUARE, values are multiplied by
// their column's scale and squared.
template <bool SQUARE, int64_t width, class T>
UNLEARN_INLINE void pack(
    const T* source, int64_t stride_t, int64_t stride_c, int64_t T_, int64_t count, const compute_t<T>* scale,
    compute_t<T>* panel) {
  using C = compute_t<T>;
  const auto value = [scale](T x, int64_t column) {
    const C loaded = load(x);
    if constexpr (!SQUARE) return loaded;
    const C scaled = loaded * scale[column];
    return scaled * scaled;
  };
  const int64_t whole = stride_c == 1 ? count / width * width : 0;
  for (int64_t t = 0; t < T_; ++t) {
    const T* row = source + t * stride_t;
    C* target = panel + t * width;
    for (int64_t c0 = 0; c0 < whole; c0 += width, target += T_ * width) {
      if constexpr (std::is_same_v<T, C> && !SQUARE) {  // left to itself, the compiler gathers across positions
        std::memcpy(target, row + c0, width * sizeof(C));
      } else {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) target[c] = value(row[c0 + c], c0 + c);
      }
    }
    for (int64_t c0 = whole; c0 < count; c0 += width, target += T_ * width) {
      const int64_t columns = std::min(width, count - c0);
      for (int64_t c = 0; c < columns; ++c) target[c] = value(row[(c0 + c) * stride_c], c0 + c);
      for (int64_t c = columns; c < width; ++c) target[c] = C(0);
    }
  }
}

enum class Epilogue { add, square, store, accumulate, accumulate_square };

// [MR, 2 vectors] += g[t][MR]^T a[t][2 vectors], then the epilogue into rows of `stride` columns.
template <int BYTES, int MR, class C>
UNLEARN_INLINE void micro_tile(
    const C* g, const C* a, int64_t T_, C* product, C* sum, int64_t stride, Epilogue epilogue) {
  typedef C Vector __attribute__((vector_size(BYTES), aligned(sizeof(C)), may_alias));
  constexpr int lanes = BYTES / sizeof(C);
  Vector acc[MR][2] = {};
  for (int64_t t = 0; t < T_; ++t, g += MR, a += 2 * lanes) {
    const Vector a0 = *reinterpret_cast<const Vector*>(a), a1 = *reinterpret_cast<const Vector*>(a + lanes);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      acc[m][0] += g[m] * a0;
      acc[m][1] += g[m] * a1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    for (int half = 0; half < 2; ++half) {
      const Vector value = acc[m][half];
      Vector& p = *reinterpret_cast<Vector*>(product + m * stride + half * lanes);
      Vector& s = *reinterpret_cast<Vector*>(sum + m * stride + half * lanes);
      switch (epilogue) {
        case Epilogue::add: s += value; break;
        case Epilogue::square: s += value * value; break;
        case Epilogue::store: p = value; break;
        case Epilogue::accumulate: p += value; break;
        case Epilogue::accumulate_square: s += (p + value) * (p + value); break;
      }
    }
  }
}

template <int BYTES, int MR, bool SQUARE, class T>
UNLEARN_INLINE void sum_over_examples(
    const SquaresProblem<T>& q, int64_t o0, int64_t tile_o, int64_t i0, int64_t tile_i, Workspace<compute_t<T>>& w) {
  using C = compute_t<T>;
  constexpr int64_t NR = 2 * BYTES / sizeof(C);
  const int64_t stride = (tile_i + NR - 1) / NR * NR;
  std::fill(w.sum, w.sum + (tile_o + MR) * stride, C(0));
  const int64_t pieces = (q.T_ + TILE_T - 1) / TILE_T;
  for (int64_t b = 0; b < q.B; ++b) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t t0 = q.T_ * piece / pieces, t1 = q.T_ * (piece + 1) / pieces;
      const Epilogue epilogue = SQUARE                ? Epilogue::add
                                : pieces == 1         ? Epilogue::square
                                : piece == 0          ? Epilogue::store
                                : piece == pieces - 1 ? Epilogue::accumulate_square
                                                      : Epilogue::accumulate;
      pack<SQUARE, NR>(
          q.a.data + b * q.a.stride_b + t0 * q.a.stride_t + i0 * q.a.stride_c, q.a.stride_t, q.a.stride_c, t1 - t0,
          tile_i, SQUARE ? q.a_scale + i0 : nullptr, w.a);
      pack<SQUARE, MR>(
          q.g.data + b * q.g.stride_b + t0 * q.g.stride_t + o0 * q.g.stride_c, q.g.stride_t, q.g.stride_c, t1 - t0,
          tile_o, SQUARE ? q.g_scale + o0 : nullptr, w.g);
      for (int64_t i = 0; i < tile_i; i += NR) {
        for (int64_t o = 0; o < tile_o; o += MR) {
          micro_tile<BYTES, MR>(
              w.g + o * (t1 - t0), w.a + i * (t1 - t0), t1 - t0, w.product + o * stride + i, w.sum + o * stride + i,
              stride, epilogue);
        }
      }
    }
  }
  for (int64_t o = 0; o < tile_o; ++o) {
    C* out = q.out + (o0 + o) * q.I + i0;
    const C* sum = w.sum + o * stride;
    for (int64_t i = 0; i < tile_i; ++i) {
      const C unit = SQUARE ? 1 / (q.g_scale[o0 + o] * q.a_scale[i0 + i]) : C(1);
      out[i] += sum[i] == 0 ? C(0) : C(q.scale) * (sum[i] * unit * unit);  // unit may be infinite
    }
  }
}

// One output tile on the machine's best instruction set. 12 x 2 accumulators fill AVX-512's 32 registers, 6 x 2 the 16
// of AVX2 and SSE; `target_clones` cannot choose such a constant, so the choice is made here.
#if UNLEARN_HAS_CLONES
template <bool SQUARE, class T>
__attribute__((target("arch=x86-64-v4"))) void tile_avx512(
    const SquaresProblem<T>& q, int64_t o0, int64_t tile_o, int64_t i0, int64_t tile_i, Workspace<compute_t<T>>& w) {
  sum_over_examples<64, 12, SQUARE>(q, o0, tile_o, i0, tile_i, w);
}
template <bool SQUARE, class T>
__attribute__((target("arch=x86-64-v3"))) void tile_avx2(
    const SquaresProblem<T>& q, int64_t o0, int64_t tile_o, int64_t i0, int64_t tile_i, Workspace<compute_t<T>>& w) {
  sum_over_examples<32, 6, SQUARE>(q, o0, tile_o, i0, tile_i, w);
}
#endif

template <bool SQUARE, class T>
void squares_tile(
    const SquaresProblem<T>& q, int64_t o0, int64_t tile_o, int64_t i0, int64_t tile_i, Workspace<compute_t<T>>& w) {
#if UNLEARN_HAS_CLONES
  if (simd_level() == Simd::avx512) return tile_avx512<SQUARE>(q, o0, tile_o, i0, tile_i, w);
  if (simd_level() == Simd::avx2) return tile_avx2<SQUARE>(q, o0, tile_o, i0, tile_i, w);
#endif
  sum_over_examples<16, 6, SQUARE>(q, o0, tile_o, i0, tile_i, w);
}

}  // namespace unlearn
