// Registers sum_grad_squared_linear_ for the CPU key. Output tiles are spread over torch's threads.
#include "cpu/sum_grad_squared_linear.h"

#include "cpu/tensors.h"

namespace unlearn {
namespace {

// Halves the tile until every thread has some, but not below what repays the packing.
void choose_tile(int64_t O, int64_t I, int64_t& tile_o, int64_t& tile_i) {
  tile_o = std::min(TILE_O, O);
  tile_i = std::min(TILE_I, I);
  const int64_t wanted = torch::stable::get_num_threads() == 1 ? 1 : 3 * int64_t(torch::stable::get_num_threads());
  const auto tiles = [&] { return ((O + tile_o - 1) / tile_o) * ((I + tile_i - 1) / tile_i); };
  while (tiles() < wanted && (tile_i > 64 || tile_o > 48)) {
    if (tile_i >= tile_o && tile_i > 64) {
      tile_i = std::max<int64_t>(64, tile_i / 2);
    } else {
      tile_o = std::max<int64_t>(48, tile_o / 2);
    }
  }
}

template <class T>
void run(SquaresProblem<T> q) {
  const bool square_inputs = q.T_ == 1;
  if (square_inputs) {  // the examples take the place of the positions
    q.a.stride_t = q.a.stride_b;
    q.g.stride_t = q.g.stride_b;
    std::swap(q.B, q.T_);
  }
  std::vector<compute_t<T>> scales(square_inputs ? q.I + q.O : 0);
  if (square_inputs) {
    column_scales(q.a, q.T_, q.I, scales.data());
    column_scales(q.g, q.T_, q.O, scales.data() + q.I);
    q.a_scale = scales.data();
    q.g_scale = scales.data() + q.I;
  }
  int64_t tile_o, tile_i;
  choose_tile(q.O, q.I, tile_o, tile_i);
  const int64_t across = (q.I + tile_i - 1) / tile_i, tiles = across * ((q.O + tile_o - 1) / tile_o);
  const int64_t work = q.B * q.T_ * tile_o * tile_i;
  torch::stable::parallel_for(
      0, tiles, std::max<int64_t>(1, GRAIN / std::max<int64_t>(work, 1)), [&](int64_t begin, int64_t end) {
        Workspace<compute_t<T>> workspace;
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t o0 = tile / across * tile_o, i0 = tile % across * tile_i;
          const int64_t o_count = std::min(tile_o, q.O - o0), i_count = std::min(tile_i, q.I - i0);
          if (square_inputs) {
            squares_tile<true>(q, o0, o_count, i0, i_count, workspace);
          } else {
            squares_tile<false>(q, o0, o_count, i0, i_count, workspace);
          }
        }
      });
}

void sum_grad_squared_linear_(Tensor out, Tensor inputs, Tensor grad_outputs, double scale) {
  STD_TORCH_CHECK(
      (inputs.dim() == 2 || inputs.dim() == 3) && grad_outputs.dim() == inputs.dim(),
      "inputs and grad_outputs must both be [B, T, features] or [B, features]");
  const bool positions = inputs.dim() == 3;
  const int64_t c = inputs.dim() - 1;
  STD_TORCH_CHECK(
      inputs.size(0) == grad_outputs.size(0) && (!positions || inputs.size(1) == grad_outputs.size(1)),
      "inputs and grad_outputs must agree in B and T");
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(0) == grad_outputs.size(c) && out.size(1) == inputs.size(c),
      "out must be [features of grad_outputs, features of inputs]");
  STD_TORCH_CHECK(inputs.scalar_type() == grad_outputs.scalar_type(), "inputs and grad_outputs must have one dtype");
  STD_TORCH_CHECK(
      out.scalar_type() == compute_dtype(inputs.scalar_type()), "out must be float32, or float64 for float64 inputs");
  if (out.numel() == 0 || inputs.numel() == 0 || grad_outputs.numel() == 0) return;
  Tensor target = torch::stable::contiguous(out);
  dispatch_floating(inputs.scalar_type(), "inputs", [&](auto type) {
    using T = decltype(type);
    const auto operand = [&](const Tensor& x) {
      return Operand<T>{data<T>(x), x.stride(0), positions ? x.stride(1) : 0, x.stride(c)};
    };
    run(SquaresProblem<T>{
        mutable_data<compute_t<T>>(target), operand(inputs), operand(grad_outputs), inputs.size(0),
        positions ? inputs.size(1) : 1, out.size(0), out.size(1), scale});
  });
  if (target.const_data_ptr() != out.const_data_ptr()) torch::stable::copy_(out, target);
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("sum_grad_squared_linear_", TORCH_BOX(&unlearn::sum_grad_squared_linear_));
}
