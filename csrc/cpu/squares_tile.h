// One tile of per-example squared gradients that are matrix products, G_b[o, i] = sum_t g[b, t, o] * a[b, t, i]:
//   out[o, i] += scale * sum_b w_b * G_b[o, i]^2   (or |G_b[o, i]|),   first[o, i] += scale * sum_b w_b * G_b[o, i]
//
// Fused: product, square or magnitude, weight, and both sums over examples; nothing of size [B, O, I] exists.
// Work: one output tile a task. The examples stream past a tile: the layer packs their g and a into cache-sized panels
// (converting to the computing type), a register micro-tile multiplies, and its epilogue adds to the tile's running
// sums, which leave the cache once, at the end. Examples with few positions share a panel, so that a micro-tile meets
// them one after another while its sums are in the first-level cache.
// A layer (linear, convolution, ...) says how panels are packed and where a tile's columns lie in the output.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu/scalar.h"

namespace unlearn {

constexpr int64_t TILE_O = 96, TILE_I = 256;  // output tile, about; its running sum is 96 KiB in float
constexpr int64_t TILE_T = 256;               // positions packed at a time

// What all layers add to. `out` and `first` are contiguous [O, columns]; `first` and `weights` may be null.
template <class C>
struct Moments {
  C *out, *first;
  const C* weights;  // [B]
  C scale;
  bool absolute;
};

// An output tile: rows [o0, o0 + rows) of one group of rows, column strips [strip0, strip0 + strips).
struct Tile {
  int64_t group, o0, rows, strip0, strips;
};

// What an epilogue does with a finished product.
enum class Finish { add, square, absolute };

// Packed positions of some examples: strips of a and of g, whose rows follow one another in t.
template <class C>
struct Panel {
  const C *a, *g;
  int64_t T;                        // positions of an example
  int64_t g_strip;                  // distance of the strips of g
  int64_t example, examples;        // the examples in the panel
  int64_t a_example, g_example;     // distance of the examples
  bool begins = true, ends = true;  // whether the positions are the examples' first, and last
  Finish finish = Finish::square;
};

// Aligned memory for a panel and the sums of a tile; `a` and `g` are what a layer needs at most, and tiles are padded to
// whole strips, at most 64 columns and 16 rows more.
template <class C>
class Workspace {
  std::unique_ptr<C[]> memory_;

 public:
  C *a, *g, *product, *sum, *first;

  Workspace(int64_t a_size, int64_t g_size, int64_t tile_rows, int64_t tile_columns) {
    const int64_t tile = (tile_rows + 16) * (tile_columns + 64), line = 64 / sizeof(C);
    const auto whole = [line](int64_t n) { return (n + line - 1) / line * line; };
    memory_.reset(new C[whole(a_size) + whole(g_size) + 3 * whole(tile) + line]);
    a = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
    g = a + whole(a_size);
    product = g + whole(g_size);
    sum = product + whole(tile);
    first = sum + whole(tile);
  }
};

// Packs 64 bytes of positions, which lie one after another, of `count` <= width columns: panel[t][width], zeros beyond
// the last column. For AVX-512 alone: two-operand permutations of vectors.
template <class C>
constexpr int64_t transposed = 64 / sizeof(C);
template <int64_t width, class C>
constexpr bool transposes = width == 12 || width * sizeof(C) == 128;

template <int64_t width, class T>
UNLEARN_INLINE void pack_transposed(const T* source, int64_t stride_c, int64_t count, compute_t<T>* panel) {
  using C = compute_t<T>;
  using Integer = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  constexpr int N = transposed<C>;
  typedef C V __attribute__((vector_size(64), aligned(sizeof(C)), may_alias));
  typedef Integer Places __attribute__((vector_size(64)));
#pragma GCC unroll 4
  for (int64_t c0 = 0; c0 < width; c0 += N) {
    V rows[N];
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c) {
      const T* column = source + (c0 + c) * stride_c;
      if (c0 + c >= count) {
        rows[c] = V{};
      } else if constexpr (std::is_same_v<T, C>) {
        rows[c] = *reinterpret_cast<const V*>(column);
      } else {
        C values[N];
        for (int t = 0; t < N; ++t) values[t] = load(column[t]);
        rows[c] = *reinterpret_cast<const V*>(values);
      }
    }
#pragma GCC unroll 4
    for (int half = N / 2; half > 0; half /= 2) {  // the blocks off the diagonal change places
      Places upper, lower;
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        upper[i] = i & half ? N + i - half : i;
        lower[i] = i & half ? N + i : i + half;
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        if (i & half) continue;
        const V x = rows[i], y = rows[i + half];
        rows[i] = __builtin_shuffle(x, y, upper);
        rows[i + half] = __builtin_shuffle(x, y, lower);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) {
      std::memcpy(panel + t * width + c0, &rows[t], std::min<int64_t>(N, width - c0) * sizeof(C));
    }
  }
}

// Packs T positions of `count` columns into strips of `width` columns, `strip` apart: panel[strip][t][column], zeros
// beyond the last column. Memory is read in its own order.
template <int64_t width, class T>
UNLEARN_INLINE void pack(
    const T* source, int64_t stride_t, int64_t stride_c, int64_t T_, int64_t count, int64_t strip,
    compute_t<T>* panel) {
  using C = compute_t<T>;
  if (std::abs(stride_t) < std::abs(stride_c)) {
    for (int64_t c0 = 0; c0 < count; c0 += width, panel += strip) {
      int64_t whole = 0;
      if constexpr (transposes<width, C>) {
        whole = stride_t == 1 ? T_ / transposed<C> * transposed<C> : 0;
        for (int64_t t = 0; t < whole; t += transposed<C>) {
          pack_transposed<width>(source + c0 * stride_c + t, stride_c, std::min(width, count - c0), panel + t * width);
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        const T* column = source + (c0 + c) * stride_c;
        const bool exists = c0 + c < count;
        for (int64_t t = whole; t < T_; ++t) panel[t * width + c] = exists ? load(column[t * stride_t]) : C(0);
      }
    }
    return;
  }
  const int64_t whole = stride_c == 1 ? count / width * width : 0;
  for (int64_t t = 0; t < T_; ++t) {
    const T* row = source + t * stride_t;
    C* target = panel + t * width;
    for (int64_t c0 = 0; c0 < whole; c0 += width, target += strip) {
      if constexpr (std::is_same_v<T, C>) {  // left to itself, the compiler gathers across positions
        std::memcpy(target, row + c0, width * sizeof(C));
      } else {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) target[c] = load(row[c0 + c]);
      }
    }
    for (int64_t c0 = whole; c0 < count; c0 += width, target += strip) {
      const int64_t columns = std::min(width, count - c0);
      for (int64_t c = 0; c < columns; ++c) target[c] = load(row[(c0 + c) * stride_c]);
      for (int64_t c = columns; c < width; ++c) target[c] = C(0);
    }
  }
}

// What becomes of an example's product (its accumulators), in rows of `stride` columns.
template <int BYTES, int MR, class C, class V>
UNLEARN_INLINE void epilogue(
    V (&acc)[MR][2], const Panel<C>& panel, C weight, C* product, C* sum, C* first, int64_t stride) {
  constexpr int lanes = BYTES / sizeof(C);
  const auto at = [stride](C* tile, int m, int half) -> V& {
    return *reinterpret_cast<V*>(tile + m * stride + half * lanes);
  };
// The accumulators stay in registers only where every loop over them is unrolled.
#define UNLEARN_EACH(statement)                                                 \
  _Pragma("GCC unroll 16") for (int m = 0; m < MR; ++m) {                       \
    _Pragma("GCC unroll 2") for (int half = 0; half < 2; ++half) { statement; } \
  }
  if (!panel.begins) UNLEARN_EACH(acc[m][half] += at(product, m, half))
  if (!panel.ends) {
    UNLEARN_EACH(at(product, m, half) = acc[m][half])
    return;
  }
  if (panel.finish == Finish::add) {
    UNLEARN_EACH(at(sum, m, half) += acc[m][half])
  } else if (panel.finish == Finish::square) {
    UNLEARN_EACH(at(sum, m, half) += weight * (acc[m][half] * acc[m][half]))
  } else {
    UNLEARN_EACH(at(sum, m, half) += weight * (acc[m][half] < 0 ? -acc[m][half] : acc[m][half]))
  }
  if (first) UNLEARN_EACH(at(first, m, half) += weight * acc[m][half])
#undef UNLEARN_EACH
}

// For each example of the panel: [MR, 2 vectors] = g[t][MR]^T a[row(t)][2 vectors], then the epilogue.
template <int BYTES, int MR, class Rows, class C>
UNLEARN_INLINE void micro_tile(
    const Panel<C>& panel, const C* g, const C* a, Rows row, const C* weights, C* product, C* sum, C* first,
    int64_t stride) {
  typedef C V __attribute__((vector_size(BYTES), aligned(sizeof(C)), may_alias));
  constexpr int lanes = BYTES / sizeof(C);
  for (int64_t e = 0; e < panel.examples; ++e, a += panel.a_example, g += panel.g_example) {
    V acc[MR][2] = {};
    const C* factors = g;
    for (int64_t t = 0; t < panel.T; ++t, factors += MR) {
      const C* values = a + row(t);
      const V a0 = *reinterpret_cast<const V*>(values), a1 = *reinterpret_cast<const V*>(values + lanes);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        acc[m][0] += factors[m] * a0;
        acc[m][1] += factors[m] * a1;
      }
    }
    epilogue<BYTES>(acc, panel, weights ? weights[panel.example + e] : C(1), product, sum, first, stride);
  }
}

// Fetches what the tile's sums will be added to while there still is something to multiply: read at the end, row by
// row, it would be waited for. Only a hint, so that rows and columns beyond the tile do not matter.
template <int64_t NR, int64_t MR, class Layer, class C>
UNLEARN_INLINE void prefetch_rows(const Layer& layer, const Tile& tile, int64_t row, int64_t strip, const C* target) {
  for (int64_t m = 0; m < std::min(MR, tile.rows - row); ++m) {
    const C* place = target + layer.row(tile, row + m) + (tile.strip0 + strip) * NR;
    for (int64_t c = 0; c < NR; c += 64 / sizeof(C)) __builtin_prefetch(place + c, 1, 2);
  }
}

// A layer has
//   moments            what to add to
//   steps()            how many panels pass a tile
//   State              what pack tells rows and strip
//   pack<NR, MR>(...)  packs one of them, and returns it
//   rows<NR>(state)    position -> where in a strip of a its row lies
//   strip<NR>(...)     where in the panel the tile's strip j of a lies
//   row(tile, row)     where in the output a tile's row begins
//   write<NR>(...)     adds one row of a tile's sums to the output
template <int BYTES, int MR, class Layer, class C>
UNLEARN_INLINE void sum_over_examples(const Layer& layer, const Tile& tile, Workspace<C>& w) {
  constexpr int64_t NR = 2 * BYTES / sizeof(C);
  const int64_t stride = tile.strips * NR, padded = (tile.rows + MR - 1) / MR * MR;
  const Moments<C>& moments = layer.moments;
  std::fill(w.sum, w.sum + padded * stride, C(0));
  if (moments.first) std::fill(w.first, w.first + padded * stride, C(0));
  for (int64_t step = 0; step < layer.steps(); ++step) {
    typename Layer::State state;
    const Panel<C> panel = layer.template pack<NR, MR>(step, tile, w, state);
    for (int64_t j = 0; j < tile.strips; ++j) {
      const C* a = panel.a + layer.template strip<NR>(panel, tile, j, state);
      for (int64_t o = 0; o < tile.rows; o += MR) {
        const int64_t place = o * stride + j * NR;
        if (step + 1 == layer.steps()) {
          prefetch_rows<NR, MR>(layer, tile, o, j, moments.out);
          if (moments.first) prefetch_rows<NR, MR>(layer, tile, o, j, moments.first);
        }
        micro_tile<BYTES, MR>(
            panel, panel.g + o / MR * panel.g_strip, a, layer.template rows<NR>(state), moments.weights,
            w.product + place, w.sum + place, moments.first ? w.first + place : nullptr, stride);
      }
    }
  }
  for (int64_t row = 0; row < tile.rows; ++row) {
    layer.template write<NR>(tile, row, w.sum + row * stride, moments.out);
    if (moments.first) layer.template write<NR>(tile, row, w.first + row * stride, moments.first);
  }
}

// 12 x 2 accumulators fill AVX-512's 32 registers, 6 x 2 the 16 of AVX2 and SSE; `target_clones` cannot choose such a
// constant, so the choice is made here.
inline int64_t strip_rows() { return simd_level() == Simd::avx512 ? 12 : 6; }
template <class C>
int64_t strip_columns() {
  return 2 * (simd_level() == Simd::avx512 ? 64 : simd_level() == Simd::avx2 ? 32 : 16) / int64_t(sizeof(C));
}

#if UNLEARN_HAS_CLONES
template <class F>
__attribute__((target("arch=x86-64-v4"))) void on_avx512(const F& work) {
  work.template run<64, 12>();
}
template <class F>
__attribute__((target("arch=x86-64-v3"))) void on_avx2(const F& work) {
  work.template run<32, 6>();
}
#endif

// Calls work.run<BYTES of a vector, MR>(), which must be inlined, compiled for the machine's best instruction set.
template <class F>
void on_best_simd(const F& work) {
#if UNLEARN_HAS_CLONES
  if (simd_level() == Simd::avx512) return on_avx512(work);
  if (simd_level() == Simd::avx2) return on_avx2(work);
#endif
  work.template run<16, 6>();
}

template <class Layer, class C>
struct TileWork {
  const Layer& layer;
  Tile tile;
  Workspace<C>& workspace;

  template <int BYTES, int MR>
  UNLEARN_INLINE void run() const {
    sum_over_examples<BYTES, MR>(layer, tile, workspace);
  }
};

}  // namespace unlearn
