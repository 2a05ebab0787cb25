// The squared per-example weight gradients of a convolution, as an implicit matrix product; see squares_tile.h:
//   G_b[o, c, k] = sum_p g[b, o, p] * x[b, c, p * stride + k * dilation - padding]
//
// Nothing unfolded is stored. Where channels fill vectors (RegionLayer), a task packs the part of the image that a few
// hundred positions need, padding written as zeros, channels innermost; every kernel offset multiplies out of that one
// copy, whose rows a table of positions finds. Where they do not, as in a first layer (UnfoldLayer), the columns
// (c, k) themselves are packed.
// Reads g once for every strip of columns and x once for every tile of output channels; writes out and first once.
#pragma once

#include "cpu/conv_geometry.h"
#include "cpu/squares_tile.h"

namespace unlearn {

constexpr int64_t REGION = 1280;  // image positions packed at a time: 160 KiB a strip of channels

template <class T>
struct Convolution {
  using C = compute_t<T>;
  Moments<C> moments;
  const T *x, *g;
  int64_t x_b, x_c, g_b, g_o;  // strides of examples and channels
  Axis axes[AXES];
  int64_t B, groups, in_channels, out_channels;  // channels of a group
  int64_t K;                                     // kernel offsets
  Boxes boxes;
  int64_t together;  // examples a panel

  int64_t row(const Tile& tile, int64_t row) const {
    return (tile.group * out_channels + tile.o0 + row) * in_channels * K;
  }
  int64_t steps() const { return boxes.number() > 1 ? B * boxes.number() : (B + together - 1) / together; }

  // Box and examples of a step, without the layer's own fields.
  UNLEARN_INLINE Panel<C> panel(int64_t step, Box& box) const {
    Panel<C> panel;
    const int64_t pieces = boxes.number(), piece = step % pieces;
    box = boxes.box(axes, piece);
    panel.example = pieces > 1 ? step / pieces : step * together;
    panel.examples = std::min(pieces > 1 ? 1 : together, B - panel.example);
    panel.T = box.positions();
    panel.begins = piece == 0;
    panel.ends = piece == pieces - 1;
    panel.finish = moments.absolute ? Finish::absolute : Finish::square;
    return panel;
  }

  // Packs `count` output channels, `stride_c` apart from the first, at the box's positions: panel[strip][t][width].
  template <int64_t width>
  UNLEARN_INLINE void pack_g(
      const T* first, int64_t stride_c, const Box& box, int64_t count, int64_t strip, C* panel) const {
    int64_t lines[AXES] = {box.count[0], box.count[1], box.count[2], box.count[3]};
    // Lines that follow one another in memory are one.
    for (int d = AXES - 2; d >= 0 && axes[d].g_stride == axes[3].g_stride * lines[3]; --d) {
      lines[3] *= lines[d];
      lines[d] = 1;
    }
    for_lines(lines, [&](int64_t line, const int64_t (&at)[AXES]) UNLEARN_INLINED {
      const T* source = first;
      for (int d = 0; d < AXES; ++d) source += (box.begin[d] + at[d]) * axes[d].g_stride;
      unlearn::pack<width>(source, axes[3].g_stride, stride_c, lines[3], count, strip, panel + line * lines[3] * width);
    });
  }

  // Packs `count` <= width channels of an example's region: panel[position][width].
  template <int64_t width>
  UNLEARN_INLINE void pack_x(const T* first, const Box& box, int64_t count, C* panel) const {
    int64_t lines[AXES], length[AXES], start[AXES];
    for (int d = 0; d < AXES; ++d) {
      lines[d] = axes[d].packed(box.count[d]);
      length[d] = axes[d].length(box.count[d]);
      start[d] = box.begin[d] * axes[d].stride - axes[d].padding;
    }
    const Axis& last = axes[3];
    for_lines(lines, [&](int64_t line, const int64_t (&at)[AXES]) UNLEARN_INLINED {
      C* target = panel + line * lines[3] * width;
      const T* source = first;
      bool inside = true;
      for (int d = 0; d < 3; ++d) {
        const int64_t position = start[d] + at[d] / length[d] + at[d] % length[d] * axes[d].stride;
        inside &= position >= 0 && position < axes[d].in;
        source += position * axes[d].x_stride;
      }
      for (int64_t phase = 0; phase < last.phases(); ++phase, target += length[3] * width) {
        const Range range = inside ? inside_image(last, start[3] + phase, length[3]) : Range{0, 0};
        std::fill(target, target + range.begin * width, C(0));
        unlearn::pack<width>(
            source + (start[3] + phase + range.begin * last.stride) * last.x_stride, last.stride * last.x_stride, x_c,
            range.end - range.begin, count, 0, target + range.begin * width);
        std::fill(target + range.end * width, target + length[3] * width, C(0));
      }
    });
  }

  template <int64_t MR>
  UNLEARN_INLINE void pack_rows(const Tile& tile, const Box& box, Panel<C>& panel, Workspace<C>& w) const {
    panel.g_example = panel.T * MR;
    panel.g_strip = panel.examples * panel.g_example;
    panel.g = w.g;
    for (int64_t e = 0; e < panel.examples; ++e) {
      const T* first = g + (panel.example + e) * g_b + (tile.group * out_channels + tile.o0) * g_o;
      pack_g<MR>(first, g_o, box, tile.rows, panel.g_strip, w.g + e * panel.g_example);
    }
  }
};

// Where the outputs' rows and the kernel's offsets lie in a packed region.
struct RegionState {
  int64_t size;          // of an example's region
  int64_t stride[AXES];  // of the region's axes
  int64_t phase[AXES];   // from one phase to the next
  int32_t rows[TILE_T];  // of each output position, at kernel offset 0

  UNLEARN_INLINE void set(const Axis (&axes)[AXES], const Box& box, int64_t width) {
    size = width;
    for (int d = AXES - 1; d >= 0; --d) {
      stride[d] = size;
      size *= axes[d].packed(box.count[d]);
    }
    int32_t* row = rows;
    for_lines(box.count, [&](int64_t, const int64_t (&at)[AXES]) UNLEARN_INLINED {
      const int64_t line = at[0] * stride[0] + at[1] * stride[1] + at[2] * stride[2];
      for (int64_t p = 0; p < box.count[3]; ++p) *row++ = int32_t(line + p * stride[3]);
    });
    for (int d = 0; d < AXES; ++d) phase[d] = axes[d].length(box.count[d]) * stride[d];
  }
  UNLEARN_INLINE int64_t kernel_offset(const Axis (&axes)[AXES], int64_t k) const {
    int64_t offset = 0;
    for (int d = AXES - 1; d >= 0; --d) {
      const int64_t distance = k % axes[d].kernel * axes[d].dilation;
      offset += distance % axes[d].stride * phase[d] + distance / axes[d].stride * stride[d];
      k /= axes[d].kernel;
    }
    return offset;
  }
};

// Column strips are numbered (strip of channels, k), k fastest.
template <class T>
struct RegionLayer : Convolution<T> {
  using C = compute_t<T>;
  using State = RegionState;

  template <int64_t NR, int64_t MR>
  UNLEARN_INLINE Panel<C> pack(int64_t step, const Tile& tile, Workspace<C>& w, State& state) const {
    Box box;
    Panel<C> panel = this->panel(step, box);
    state.set(this->axes, box, NR);
    panel.a = w.a;
    panel.a_example = state.size;
    this->template pack_rows<MR>(tile, box, panel, w);
    const int64_t first = tile.strip0 / this->K, last = (tile.strip0 + tile.strips - 1) / this->K;
    C* target = w.a;
    for (int64_t strip = first; strip <= last; ++strip) {
      const int64_t c0 = strip * NR, count = std::min(NR, this->in_channels - c0);
      for (int64_t e = 0; e < panel.examples; ++e, target += state.size) {
        const T* x = this->x + (panel.example + e) * this->x_b + (tile.group * this->in_channels + c0) * this->x_c;
        this->template pack_x<NR>(x, box, count, target);
      }
    }
    return panel;
  }

  template <int64_t NR>
  UNLEARN_INLINE auto rows(const State& state) const {
    return [rows = state.rows](int64_t t) { return rows[t]; };
  }
  template <int64_t NR>
  UNLEARN_INLINE int64_t strip(const Panel<C>& panel, const Tile& tile, int64_t j, const State& state) const {
    const int64_t strip = tile.strip0 + j, channels = strip / this->K - tile.strip0 / this->K;
    return channels * panel.examples * state.size + state.kernel_offset(this->axes, strip % this->K);
  }
  template <int64_t NR>
  UNLEARN_INLINE void write(const Tile& tile, int64_t row, const C* sum, C* target) const {
    const int64_t K = this->K;
    C* out = target + this->row(tile, row);
    for (int64_t j = 0; j < tile.strips; ++j, sum += NR) {
      const int64_t strip = tile.strip0 + j, c0 = strip / K * NR, count = std::min(NR, this->in_channels - c0);
      C* place = out + c0 * K + strip % K;
      for (int64_t c = 0; c < count; ++c) place[c * K] += this->moments.scale * sum[c];
    }
  }
};

// Columns lie as in the output, (c, k).
template <class T>
struct UnfoldLayer : Convolution<T> {
  using C = compute_t<T>;
  struct State {};

  template <int64_t NR, int64_t MR>
  UNLEARN_INLINE Panel<C> pack(int64_t step, const Tile& tile, Workspace<C>& w, State&) const {
    Box box;
    Panel<C> panel = this->panel(step, box);
    panel.a = w.a;
    panel.a_example = panel.T * NR;
    this->template pack_rows<MR>(tile, box, panel, w);
    const int64_t columns = this->in_channels * this->K, begin = tile.strip0 * NR;
    for (int64_t column = begin; column < begin + tile.strips * NR; ++column) {
      C* target = w.a + (column - begin) / NR * panel.examples * panel.a_example + column % NR;
      for (int64_t e = 0; e < panel.examples; ++e, target += panel.a_example) {
        if (column < columns) {
          pack_column<NR>(tile.group, panel.example + e, column, box, target);
        } else {
          for (int64_t t = 0; t < panel.T; ++t) target[t * NR] = C(0);
        }
      }
    }
    return panel;
  }

  // One column at the box's positions, to every NR-th place.
  template <int64_t NR>
  UNLEARN_INLINE void pack_column(int64_t group, int64_t b, int64_t column, const Box& box, C* target) const {
    int64_t k = column % this->K, start[AXES];
    for (int d = AXES - 1; d >= 0; --d) {
      const Axis& axis = this->axes[d];
      start[d] = box.begin[d] * axis.stride + k % axis.kernel * axis.dilation - axis.padding;
      k /= axis.kernel;
    }
    const Axis& last = this->axes[3];
    const T* x = this->x + b * this->x_b + (group * this->in_channels + column / this->K) * this->x_c;
    const int64_t n = box.count[3];
    const Range range = inside_image(last, start[3], n);
    for_lines(box.count, [&](int64_t line, const int64_t (&at)[AXES]) UNLEARN_INLINED {
      C* row = target + line * n * NR;
      const T* source = x + start[3] * last.x_stride;
      bool inside = true;
      for (int d = 0; d < 3; ++d) {
        const int64_t position = start[d] + at[d] * this->axes[d].stride;
        inside &= position >= 0 && position < this->axes[d].in;
        source += position * this->axes[d].x_stride;
      }
      const int64_t begin = inside ? range.begin : 0, end = inside ? range.end : 0;
      const int64_t stride = last.stride * last.x_stride;
      for (int64_t p = 0; p < begin; ++p) row[p * NR] = C(0);
      for (int64_t p = begin; p < end; ++p) row[p * NR] = load(source[p * stride]);
      for (int64_t p = end; p < n; ++p) row[p * NR] = C(0);
    });
  }

  template <int64_t NR>
  UNLEARN_INLINE auto rows(const State&) const {
    return [](int64_t t) { return t * NR; };
  }
  template <int64_t NR>
  UNLEARN_INLINE int64_t strip(const Panel<C>& panel, const Tile&, int64_t j, const State&) const {
    return j * panel.examples * panel.a_example;
  }
  template <int64_t NR>
  UNLEARN_INLINE void write(const Tile& tile, int64_t row, const C* sum, C* target) const {
    const int64_t columns = this->in_channels * this->K, i0 = tile.strip0 * NR;
    C* out = target + this->row(tile, row) + i0;
    const int64_t count = std::min(tile.strips * NR, columns - i0);
    for (int64_t i = 0; i < count; ++i) out[i] += this->moments.scale * sum[i];
  }
};

}  // namespace unlearn
