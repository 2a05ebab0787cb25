// Registers sum_grad_squared_conv_ for the CPU key. Output tiles are spread over torch's threads; their shapes depend on
// the number of threads, the order of summation within an element does not.
#include "cpu/sum_grad_squared_conv.h"

#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <vector>

#include "cpu/squares_tensors.h"
#include "cpu/sum_grad_squared_depthwise.h"

namespace unlearn {
namespace {

using Ints = std::vector<int64_t>;

template <class T>
Convolution<T> convolution(
    const Tensor& inputs, const Tensor& grad_outputs, const Tensor& out, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups) {
  Convolution<T> q;
  q.x = data<T>(inputs);
  q.g = data<T>(grad_outputs);
  q.x_b = inputs.stride(0);
  q.x_c = inputs.stride(2);
  q.g_b = grad_outputs.stride(0);
  q.g_o = grad_outputs.stride(2);
  q.B = inputs.size(0);
  q.groups = groups;
  q.in_channels = inputs.size(2) / groups;
  q.out_channels = grad_outputs.size(2) / groups;
  q.axes[0].in = q.axes[0].out = inputs.size(1);
  q.axes[0].x_stride = inputs.stride(1);
  q.axes[0].g_stride = grad_outputs.stride(1);
  q.K = 1;
  const int64_t spatial = inputs.dim() - 3;
  for (int64_t d = 0; d < spatial; ++d) {
    q.axes[AXES - spatial + d] = {
        inputs.size(3 + d), grad_outputs.size(3 + d), out.size(2 + d),           stride[d], padding[d],
        dilation[d],        inputs.stride(3 + d),     grad_outputs.stride(3 + d)};
    q.K *= out.size(2 + d);
  }
  return q;
}

// How many strips of columns a tile takes: about TILE_I columns, and whole kernels where these are small.
int64_t tile_strips(int64_t K, int64_t NR) {
  const int64_t wanted = std::max<int64_t>(1, (TILE_I + 32) / NR);
  if (K <= wanted) return wanted / K * K;
  const int64_t parts = (K + wanted - 1) / wanted;
  return (K + parts - 1) / parts;
}

template <class T>
void add_depthwise(Convolution<T> q) {
  using C = compute_t<T>;
  const Box box = q.boxes.largest(q.axes);
  const int64_t region = packed_positions(q.axes, box.count), NR = strip_columns<C>();
  q.together = std::max<int64_t>(1, std::min(TILE_T / box.positions(), REGION / region));
  const int64_t tasks = (q.groups + NR - 1) / NR * q.out_channels;
  const int64_t work = q.B * q.axes[0].out * q.axes[1].out * q.axes[2].out * q.axes[3].out * q.K * NR;
  torch::stable::parallel_for(0, tasks, grain(work), [&](int64_t begin, int64_t end) {
    Workspace<C> workspace(q.together * region * NR, TILE_T * NR, q.K, NR);
    for (int64_t task = begin; task < end; ++task) {
      on_best_simd(DepthwiseWork<T>{q, task / q.out_channels * NR, task % q.out_channels, workspace});
    }
  });
}

template <class T>
void add_squares(Convolution<T> q) {
  using C = compute_t<T>;
  const int64_t NR = strip_columns<C>(), channel_strips = (q.in_channels + NR - 1) / NR;
  const int64_t positions = q.axes[0].out * q.axes[1].out * q.axes[2].out * q.axes[3].out, work = q.B * positions;
  const int64_t g_size = TILE_T * (TILE_O + 16);

  if (q.in_channels == 1 && q.groups > 1 && cut(q.axes, TILE_T, REGION, q.boxes)) return add_depthwise(q);

  // Multiplying straight from the image pays where channels fill the strips, and where the packed part of the image is
  // smaller than what is unfolded from it.
  bool from_image = 3 * q.in_channels >= 2 * channel_strips * NR && cut(q.axes, TILE_T, REGION, q.boxes);
  int64_t region = 0;
  if (from_image) {
    const Box box = q.boxes.largest(q.axes);
    region = packed_positions(q.axes, box.count);
    from_image = region <= q.K * box.positions();
  }
  if (from_image) {
    q.together = std::max<int64_t>(1, std::min(TILE_T / positions, REGION / region));
    const RegionLayer<T> layer{q};
    const Grid grid = tile_grid<C>(q.groups, q.out_channels, channel_strips * q.K, tile_strips(q.K, NR));
    const int64_t strips_of_channels = std::min(channel_strips, (grid.strips + q.K - 2) / q.K + 1);
    return add_tiles<C>(layer, grid, work, strips_of_channels * q.together * region * NR, g_size);
  }
  cut(q.axes, TILE_T, std::numeric_limits<int64_t>::max(), q.boxes);
  q.together = std::max<int64_t>(1, TILE_T / positions);
  const UnfoldLayer<T> layer{q};
  const Grid grid = tile_grid<C>(q.groups, q.out_channels, (q.in_channels * q.K + NR - 1) / NR, TILE_I / NR);
  add_tiles<C>(layer, grid, work, TILE_T * grid.strips * NR, g_size);
}

void check(
    const Tensor& out, const Tensor& inputs, const Tensor& grad_outputs, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups) {
  const int64_t spatial = inputs.dim() - 3;
  STD_TORCH_CHECK(spatial >= 1 && spatial <= 3, "inputs must be [B, W, C, *in] with 1 to 3 spatial axes");
  STD_TORCH_CHECK(
      grad_outputs.dim() == inputs.dim() && out.dim() == spatial + 2,
      "out, inputs and grad_outputs must have the same spatial axes");
  STD_TORCH_CHECK(
      int64_t(stride.size()) == spatial && int64_t(padding.size()) == spatial && int64_t(dilation.size()) == spatial,
      "stride, padding and dilation must have one entry a spatial axis");
  STD_TORCH_CHECK(
      inputs.size(0) == grad_outputs.size(0) && inputs.size(1) == grad_outputs.size(1),
      "inputs and grad_outputs must agree in B and W");
  STD_TORCH_CHECK(
      groups >= 1 && inputs.size(2) == groups * out.size(1) && grad_outputs.size(2) == out.size(0) &&
          out.size(0) % groups == 0,
      "out must be [O, C / groups, *kernel]");
  for (int64_t d = 0; d < spatial; ++d) {
    STD_TORCH_CHECK(
        stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1,
        "stride and dilation must be positive, padding not below 0");
    const int64_t room = inputs.size(3 + d) + 2 * padding[d] - dilation[d] * (out.size(2 + d) - 1) - 1;
    STD_TORCH_CHECK(
        room >= 0 && grad_outputs.size(3 + d) == room / stride[d] + 1,
        "grad_outputs does not have the positions that inputs give");
  }
}

void sum_grad_squared_conv_(
    Tensor out, Tensor inputs, Tensor grad_outputs, Ints stride, Ints padding, Ints dilation, int64_t groups,
    std::optional<Tensor> weights, std::optional<Tensor> first, double scale, bool absolute) {
  check(out, inputs, grad_outputs, stride, padding, dilation, groups);
  STD_TORCH_CHECK(inputs.scalar_type() == grad_outputs.scalar_type(), "inputs and grad_outputs must have one dtype");
  check_moments(out, grad_outputs, weights, first);
  if (out.numel() == 0 || inputs.numel() == 0 || grad_outputs.numel() == 0) return;
  MomentTensors tensors(out, weights, first);
  dispatch_floating(inputs.scalar_type(), "inputs", [&](auto type) {
    using T = decltype(type);
    Convolution<T> q = convolution<T>(inputs, grad_outputs, out, stride, padding, dilation, groups);
    q.moments = tensors.moments<compute_t<T>>(scale, absolute);
    add_squares(q);
  });
  tensors.write_back();
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("sum_grad_squared_conv_", TORCH_BOX(&unlearn::sum_grad_squared_conv_));
}
