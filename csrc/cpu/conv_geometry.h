// Where a convolution's positions lie: which output positions are taken together, and which part of the image they need.
//
// An example's positions have four axes: its images, and three spatial ones (absent ones have length 1); the axis of
// images is one with kernel 1. Output position p and kernel offset k meet at input p * stride + k * dilation - padding.
#pragma once

#include <algorithm>

#include "cpu/scalar.h"

namespace unlearn {

constexpr int AXES = 4;

struct Axis {
  int64_t in = 1, out = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
  int64_t x_stride = 0, g_stride = 0;  // in memory

  // In a packed part of the image, positions of one phase (their distance is a multiple of the stride) follow one
  // another, so that successive outputs read successive places: place of output p and offset k is
  // phase(k) * length + p + k * dilation / stride. Phases that no offset reads are left out.
  int64_t reach() const { return (kernel - 1) * dilation; }
  int64_t phases() const { return std::min(stride, reach() + 1); }
  int64_t length(int64_t outputs) const { return outputs + reach() / stride; }
  int64_t packed(int64_t outputs) const { return phases() * length(outputs); }
};

// Output positions [begin, begin + count) along each axis.
struct Box {
  int64_t begin[AXES], count[AXES];
  int64_t positions() const { return count[0] * count[1] * count[2] * count[3]; }
};

// How an example's output positions are cut into boxes.
struct Boxes {
  int64_t pieces[AXES];

  int64_t number() const { return pieces[0] * pieces[1] * pieces[2] * pieces[3]; }
  Box box(const Axis (&axes)[AXES], int64_t index) const {
    Box box;
    for (int d = AXES - 1; d >= 0; --d) {
      const int64_t piece = index % pieces[d];
      index /= pieces[d];
      box.begin[d] = axes[d].out * piece / pieces[d];
      box.count[d] = axes[d].out * (piece + 1) / pieces[d] - box.begin[d];
    }
    return box;
  }
  Box largest(const Axis (&axes)[AXES]) const { return box(axes, number() - 1); }
};

inline int64_t packed_positions(const Axis (&axes)[AXES], const int64_t (&count)[AXES]) {
  int64_t n = 1;
  for (int d = 0; d < AXES; ++d) n *= axes[d].packed(count[d]);
  return n;
}

// The fewest boxes of at most `positions` outputs that need at most `region` positions of the image. Long lines first:
// the last axis is cut only where one line is too much. False where a single output needs more than `region`.
inline bool cut(const Axis (&axes)[AXES], int64_t positions, int64_t region, Boxes& boxes) {
  int64_t count[AXES] = {1, 1, 1, 1}, outputs = 1;
  if (packed_positions(axes, count) > region) return false;
  for (int d = AXES - 1; d >= 0; --d) {
    int64_t &n = count[d], pieces = 0;
    do {
      pieces = std::max(pieces + 1, (axes[d].out * outputs + positions - 1) / positions);
      pieces = std::min(pieces, axes[d].out);
      n = (axes[d].out + pieces - 1) / pieces;
    } while (n > 1 && (n * outputs > positions || packed_positions(axes, count) > region));
    boxes.pieces[d] = pieces;
    outputs *= n;
  }
  return true;
}

struct Range {
  int64_t begin, end;
};

// Which of `count` positions, one stride apart from `start` on, lie in the image.
inline Range inside_image(const Axis& axis, int64_t start, int64_t count) {
  const int64_t begin = std::clamp<int64_t>((-start + axis.stride - 1) / axis.stride, 0, count);
  return {begin, std::clamp<int64_t>((axis.in - start + axis.stride - 1) / axis.stride, begin, count)};
}

// Calls f(line, the positions along axes 0 to 2) for each of the box's or region's lines along the last axis.
template <class F>
UNLEARN_INLINE void for_lines(const int64_t (&count)[AXES], F f) {
  int64_t line = 0;
  for (int64_t p0 = 0; p0 < count[0]; ++p0) {
    for (int64_t p1 = 0; p1 < count[1]; ++p1) {
      for (int64_t p2 = 0; p2 < count[2]; ++p2, ++line) {
        const int64_t at[AXES] = {p0, p1, p2, 0};
        f(line, at);
      }
    }
  }
}

}  // namespace unlearn
