// out[o, i] += scale * sum_b w_b * (sum_t g[b, t, o] * a[b, t, i])^2, the squared per-example gradients of a linear layer
// (or their magnitudes), and the first moment beside them; see squares_tile.h.
//
// Reads g and a once for every tile of the output that needs them, writes out and first once.
// One position an example (T = 1) is a plain product, of squares for `out`: the examples then take the place of
// positions, the square and the weight move into the packing, and both operands are packed once, for all tiles.
#pragma once

#include <cmath>

#include "cpu/squares_tile.h"

namespace unlearn {

// A [B, T, C] operand with any strides.
template <class T>
struct Operand {
  const T* data;
  int64_t stride_b, stride_t, stride_c;
};

template <class T>
struct LinearLayer {
  using C = compute_t<T>;
  struct State {};
  Moments<C> moments;
  Operand<T> a, g;  // inputs [B, T, I], grad_outputs [B, T, O]
  int64_t B, T_, O, I;

  int64_t pieces() const { return (T_ + TILE_T - 1) / TILE_T; }
  int64_t together() const { return std::max<int64_t>(1, TILE_T / T_); }  // examples a panel
  int64_t steps() const { return pieces() > 1 ? B * pieces() : (B + together() - 1) / together(); }

  template <int64_t NR, int64_t MR>
  UNLEARN_INLINE Panel<C> pack(int64_t step, const Tile& tile, Workspace<C>& w, State&) const {
    Panel<C> panel;
    const int64_t pieces = this->pieces(), piece = step % pieces;
    const int64_t t0 = T_ * piece / pieces, t1 = T_ * (piece + 1) / pieces, i0 = tile.strip0 * NR;
    panel.example = pieces > 1 ? step / pieces : step * together();
    panel.examples = std::min(pieces > 1 ? 1 : together(), B - panel.example);
    panel.T = t1 - t0;
    panel.a_example = panel.T * NR;
    panel.g_example = panel.T * MR;
    const int64_t a_strip = panel.examples * panel.a_example;
    panel.g_strip = panel.examples * panel.g_example;
    for (int64_t e = 0; e < panel.examples; ++e) {
      const int64_t b = panel.example + e;
      unlearn::pack<NR>(
          a.data + b * a.stride_b + t0 * a.stride_t + i0 * a.stride_c, a.stride_t, a.stride_c, panel.T,
          std::min(tile.strips * NR, I - i0), a_strip, w.a + e * panel.a_example);
      unlearn::pack<MR>(
          g.data + b * g.stride_b + t0 * g.stride_t + tile.o0 * g.stride_c, g.stride_t, g.stride_c, panel.T, tile.rows,
          panel.g_strip, w.g + e * panel.g_example);
    }
    panel.a = w.a;
    panel.g = w.g;
    panel.begins = piece == 0;
    panel.ends = piece == pieces - 1;
    panel.finish = moments.absolute ? Finish::absolute : Finish::square;
    return panel;
  }

  template <int64_t NR>
  UNLEARN_INLINE auto rows(const State&) const {
    return [](int64_t t) { return t * NR; };
  }
  template <int64_t NR>
  UNLEARN_INLINE int64_t strip(const Panel<C>& panel, const Tile&, int64_t j, const State&) const {
    return j * panel.examples * panel.a_example;
  }
  UNLEARN_INLINE int64_t row(const Tile& tile, int64_t row) const { return (tile.o0 + row) * I; }
  template <int64_t NR>
  UNLEARN_INLINE void write(const Tile& tile, int64_t row, const C* sum, C* target) const {
    const int64_t i0 = tile.strip0 * NR, count = std::min(tile.strips * NR, I - i0);
    C* out = target + this->row(tile, row) + i0;
    for (int64_t i = 0; i < count; ++i) out[i] += moments.scale * sum[i];
  }
};

constexpr int64_t STRIPS = 4;  // packed together: a row's visit is worth more than one cache line

// For each column over B examples, the power of two that brings its largest magnitude, times the root of the example's
// weight, near 1; 1 where that is 0 or not finite.
template <class T>
UNLEARN_INLINE void column_scales(
    const Operand<T>& x, int64_t B, int64_t c0, int64_t columns, const compute_t<T>* weights, compute_t<T>* scales) {
  using C = compute_t<T>;
  std::fill(scales, scales + columns, C(0));
  const auto add = [&](const T* row, int64_t stride, C root) UNLEARN_INLINED {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const C value = load(row[c * stride]) * root, magnitude = value < 0 ? -value : value;
      scales[c] = magnitude > scales[c] ? magnitude : scales[c];
    }
  };
  for (int64_t b = 0; b < B; ++b) {
    const T* row = x.data + b * x.stride_b + c0 * x.stride_c;
    const C root = weights ? std::sqrt(weights[b] < 0 ? -weights[b] : weights[b]) : C(1);
    if (x.stride_c == 1) {
      add(row, 1, root);
    } else {
      add(row, x.stride_c, root);
    }
  }
  const int limit = std::numeric_limits<C>::max_exponent - 2;  // its inverse must be finite too
  for (int64_t c = 0; c < columns; ++c) {
    const bool ordinary = scales[c] > 0 && is_finite(scales[c]);
    scales[c] = ordinary ? std::ldexp(C(1), -std::clamp(std::ilogb(scales[c]), -limit, limit)) : C(1);
  }
}

// What a factor becomes before the product: itself, its magnitude, or its square.
enum class Factor { value, magnitude, square };

// Packs strips [strip, strip + strips) of an operand over all examples. Squares are scaled; `units` takes the inverse
// scales.
template <int64_t width, class T>
UNLEARN_INLINE void pack_factors(
    const Operand<T>& x, int64_t B, int64_t columns, int64_t strip, int64_t strips, Factor factor,
    const compute_t<T>* weights, compute_t<T>* units, compute_t<T>* panel) {
  using C = compute_t<T>;
  const int64_t c0 = strip * width, count = std::min(strips * width, columns - c0);
  C scales[STRIPS * width];
  std::fill(scales, scales + STRIPS * width, C(1));
  if (factor == Factor::square) {
    column_scales(x, B, c0, count, weights, scales);
    for (int64_t c = 0; c < count; ++c) units[c0 + c] = 1 / scales[c];
  }
  panel += strip * B * width;
  for (int64_t b = 0; b < B; ++b, panel += width) {
    const T* row = x.data + b * x.stride_b + c0 * x.stride_c;
    const C weight = weights ? weights[b] : C(1);
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t s0 = s * width;
      C* target = panel + s0 * B;
      C values[width];
      if (x.stride_c == 1 && count >= s0 + width) {
        for (int64_t c = 0; c < width; ++c) values[c] = load(row[s0 + c]);
      } else {
        for (int64_t c = 0; c < width; ++c) values[c] = s0 + c < count ? load(row[(s0 + c) * x.stride_c]) : C(0);
      }
      if (factor == Factor::value) {
        for (int64_t c = 0; c < width; ++c) target[c] = weight * values[c];
      } else if (factor == Factor::magnitude) {
        for (int64_t c = 0; c < width; ++c) target[c] = weight * (values[c] < 0 ? -values[c] : values[c]);
      } else {  // the weight goes between: with it both factors are near 1
        for (int64_t c = 0; c < width; ++c) {
          const C scaled = values[c] * scales[s0 + c];
          target[c] = scaled * weight * scaled;
        }
      }
    }
  }
}

// Strips [begin, end) of both operands, the strips of g first; `weights` may be null.
template <class T>
struct FactorWork {
  using C = compute_t<T>;
  Operand<T> a, g;
  int64_t B, O, I;
  Factor factor;
  const C* weights;
  C *a_units, *g_units, *a_panel, *g_panel;
  int64_t begin, end;

  template <int BYTES, int MR>
  UNLEARN_INLINE void run() const {
    constexpr int64_t NR = 2 * BYTES / sizeof(C);
    const int64_t g_strips = (O + MR - 1) / MR;
    for (int64_t strip = begin, next; strip < std::min(end, g_strips); strip = next) {
      next = std::min({strip + STRIPS, end, g_strips});
      pack_factors<MR>(g, B, O, strip, next - strip, factor, weights, g_units, g_panel);
    }
    for (int64_t strip = std::max(begin, g_strips), next; strip < end; strip = next) {
      next = std::min(strip + STRIPS, end);
      pack_factors<NR>(a, B, I, strip - g_strips, next - strip, factor, (const C*)nullptr, a_units, a_panel);
    }
  }
};

// T = 1, both operands packed: out[o, i] += scale * sum_b g[b, o] * a[b, i], the factors as they were packed.
template <class T>
struct PackedProducts {
  using C = compute_t<T>;
  struct State {};
  Moments<C> moments;          // `out` alone; scale and units
  const C *a, *g;              // [strip][B][columns of a strip]
  const C *a_units, *g_units;  // inverse scales, or null
  int64_t B, O, I;

  int64_t steps() const { return (B + TILE_T - 1) / TILE_T; }

  template <int64_t NR, int64_t MR>
  UNLEARN_INLINE Panel<C> pack(int64_t step, const Tile& tile, Workspace<C>&, State&) const {
    const int64_t t0 = B * step / steps(), t1 = B * (step + 1) / steps();
    Panel<C> panel;
    panel.a = a + (tile.strip0 * B + t0) * NR;
    panel.g = g + tile.o0 * B + t0 * MR;
    panel.T = t1 - t0;
    panel.g_strip = B * MR;
    panel.example = 0;
    panel.examples = 1;
    panel.a_example = panel.g_example = 0;
    panel.finish = Finish::add;
    return panel;
  }

  template <int64_t NR>
  UNLEARN_INLINE auto rows(const State&) const {
    return [](int64_t t) { return t * NR; };
  }
  template <int64_t NR>
  UNLEARN_INLINE int64_t strip(const Panel<C>&, const Tile&, int64_t j, const State&) const {
    return j * B * NR;
  }
  UNLEARN_INLINE int64_t row(const Tile& tile, int64_t row) const { return (tile.o0 + row) * I; }
  template <int64_t NR>
  UNLEARN_INLINE void write(const Tile& tile, int64_t row, const C* sum, C* target) const {
    const int64_t i0 = tile.strip0 * NR, count = std::min(tile.strips * NR, I - i0);
    C* out = target + this->row(tile, row) + i0;
    if (!a_units) {
      for (int64_t i = 0; i < count; ++i) out[i] += moments.scale * sum[i];
      return;
    }
    const C g_unit = g_units[tile.o0 + row], largest = std::numeric_limits<C>::max();
    for (int64_t i = 0; i < count; ++i) {
      const C product = g_unit * a_units[i0 + i];
      const C unit = product > largest ? largest : product;  // finite, so that 0 stays 0; vectors have no branch for it
      out[i] += moments.scale * (sum[i] * unit * unit);
    }
  }
};

}  // namespace unlearn
