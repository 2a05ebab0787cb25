// Registers sum_grad_squared_linear_ for the CPU key. Output tiles are spread over torch's threads; their shapes depend
// on the number of threads, the order of summation within an element does not.
#include "cpu/sum_grad_squared_linear.h"

#include <vector>

#include "cpu/squares_tensors.h"

namespace unlearn {
namespace {

template <class C, class Layer>
void add_linear_tiles(const Layer& layer, int64_t work, int64_t a_size, int64_t g_size) {
  const int64_t NR = strip_columns<C>();
  add_tiles<C>(layer, tile_grid<C>(1, layer.O, (layer.I + NR - 1) / NR, TILE_I / NR), work, a_size, g_size);
}

// T = 1. The first moment is a product of its own.
template <class T>
void add_products(const LinearLayer<T>& q) {
  using C = compute_t<T>;
  const int64_t MR = strip_rows(), NR = strip_columns<C>();
  const int64_t g_strips = (q.O + MR - 1) / MR, a_strips = (q.I + NR - 1) / NR;
  const int64_t g_size = g_strips * MR * q.B, a_size = a_strips * NR * q.B, line = 64 / sizeof(C);
  std::unique_ptr<C[]> memory(new C[g_size + a_size + 2 * line]);
  C* a_panel = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  C* g_panel = a_panel + (a_size + line - 1) / line * line;
  std::vector<C> a_units(q.I), g_units(q.O);

  const auto add = [&](Factor factor, C* target) {
    const bool square = factor == Factor::square;
    FactorWork<T> work{q.a,     q.g,     q.B, q.O, q.I, factor, q.moments.weights, a_units.data(), g_units.data(),
                       a_panel, g_panel, 0,   0};
    torch::stable::parallel_for(0, g_strips + a_strips, grain(q.B * NR), [&](int64_t begin, int64_t end) {
      FactorWork<T> part = work;
      part.begin = begin;
      part.end = end;
      on_best_simd(part);
    });
    PackedProducts<T> products{
        Moments<C>{target, nullptr, nullptr, q.moments.scale, false},
        a_panel,
        g_panel,
        square ? work.a_units : nullptr,
        square ? work.g_units : nullptr,
        q.B,
        q.O,
        q.I};
    add_linear_tiles<C>(products, q.B, 0, 0);
  };

  add(q.moments.absolute ? Factor::magnitude : Factor::square, q.moments.out);
  if (q.moments.first) add(Factor::value, q.moments.first);
}

void sum_grad_squared_linear_(
    Tensor out, Tensor inputs, Tensor grad_outputs, std::optional<Tensor> weights, std::optional<Tensor> first,
    double scale, bool absolute) {
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
  check_moments(out, grad_outputs, weights, first);
  if (out.numel() == 0 || inputs.numel() == 0 || grad_outputs.numel() == 0) return;
  MomentTensors tensors(out, weights, first);
  dispatch_floating(inputs.scalar_type(), "inputs", [&](auto type) {
    using T = decltype(type);
    const auto operand = [&](const Tensor& x) {
      return Operand<T>{data<T>(x), x.stride(0), positions ? x.stride(1) : 0, x.stride(c)};
    };
    const LinearLayer<T> layer{
        tensors.moments<compute_t<T>>(scale, absolute),
        operand(inputs),
        operand(grad_outputs),
        inputs.size(0),
        positions ? inputs.size(1) : 1,
        out.size(0),
        out.size(1)};
    if (layer.T_ == 1) return add_products(layer);
    add_linear_tiles<compute_t<T>>(layer, layer.B * layer.T_, TILE_T * (TILE_I + 64), TILE_T * (TILE_O + 16));
  });
  tensors.write_back();
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("sum_grad_squared_linear_", TORCH_BOX(&unlearn::sum_grad_squared_linear_));
}
