// What the registrations of the sum_grad_squared operators share: out and first as contiguous memory, tiles.
#pragma once

#include <optional>

#include "cpu/squares_tile.h"
#include "cpu/tensors.h"

namespace unlearn {

// out and first, copied to contiguous memory and back where they are not; weights likewise.
class MomentTensors {
 public:
  MomentTensors(const Tensor& out, const std::optional<Tensor>& weights, const std::optional<Tensor>& first)
      : out_(out), out_target_(torch::stable::contiguous(out)) {
    if (weights) weights_ = torch::stable::contiguous(*weights);
    if (first) {
      first_ = *first;
      first_target_ = torch::stable::contiguous(*first);
    }
  }
  template <class C>
  Moments<C> moments(double scale, bool absolute) const {
    return {
        mutable_data<C>(out_target_), first_ ? mutable_data<C>(*first_target_) : nullptr,
        weights_ ? data<C>(*weights_) : nullptr, C(scale), absolute};
  }
  void write_back() {
    copy_where_moved(out_, out_target_);
    if (first_) copy_where_moved(*first_, *first_target_);
  }

 private:
  static void copy_where_moved(Tensor& tensor, const Tensor& target) {
    if (target.const_data_ptr() != tensor.const_data_ptr()) torch::stable::copy_(tensor, target);
  }
  Tensor out_, out_target_;
  std::optional<Tensor> first_, first_target_, weights_;
};

// Tiles of whole strips over an output of groups of `O` rows, with `all_strips` column strips each.
struct Grid {
  int64_t groups, O, all_strips, rows, strips;

  int64_t across() const { return (all_strips + strips - 1) / strips; }
  int64_t down() const { return (O + rows - 1) / rows; }
  int64_t tiles() const { return groups * down() * across(); }
  Tile tile(int64_t index) const {
    const int64_t o0 = index / across() % down() * rows, strip0 = index % across() * strips;
    const int64_t group = index / across() / down();
    return {group, o0, std::min(rows, O - o0), strip0, std::min(strips, all_strips - strip0)};
  }
};

// Halves the tiles until every thread has some, but not below what repays the packing.
template <class C>
Grid tile_grid(int64_t groups, int64_t O, int64_t all_strips, int64_t strips) {
  const int64_t NR = strip_columns<C>(), MR = strip_rows();
  Grid grid{groups, O, all_strips, std::min(TILE_O, (O + MR - 1) / MR * MR), std::min(strips, all_strips)};
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads == 1 ? 1 : 3 * threads;
  const int64_t least_rows = TILE_O / 2, least_strips = std::max<int64_t>(1, 64 / NR);
  while (grid.tiles() < wanted && (grid.rows > least_rows || grid.strips > least_strips)) {
    if (grid.strips > least_strips && (grid.strips * NR >= grid.rows || grid.rows <= least_rows)) {
      grid.strips = std::max(least_strips, (grid.strips + 1) / 2);
    } else {
      grid.rows = std::max(least_rows, grid.rows / 2 / MR * MR);
    }
  }
  return grid;
}

// Tasks a thread should at least take, of `work` elements each.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(work, 1)); }

// All tiles of a layer, with panels of at most a_size and g_size elements; `work` multiplications an output element.
template <class C, class Layer>
void add_tiles(const Layer& layer, const Grid& grid, int64_t work, int64_t a_size, int64_t g_size) {
  const int64_t columns = grid.strips * strip_columns<C>();
  torch::stable::parallel_for(0, grid.tiles(), grain(work * grid.rows * columns), [&](int64_t begin, int64_t end) {
    Workspace<C> workspace(a_size, g_size, grid.rows, columns);
    for (int64_t tile = begin; tile < end; ++tile) {
      on_best_simd(TileWork<Layer, C>{layer, grid.tile(tile), workspace});
    }
  });
}

}  // namespace unlearn
