// Registers sum_grad_squared_scale_ for the CPU key. Groups of examples and ranges of columns are spread over threads.
#include "cpu/sum_grad_squared_scale.h"

#include <vector>

#include "cpu/moment_tensors.h"
#include "cpu/tensors.h"

namespace unlearn {
namespace {

// More groups let more threads work where there are few columns. A group's sums cost memory, and their addition time.
int64_t groups_of(int64_t B, int64_t T, int64_t C) {
  const int64_t most = std::min<int64_t>({B, 16, B * T / 16, (1 << 16) / C});
  return std::max<int64_t>(1, most);
}

template <class T>
void run(const ScaleProblem<T>& q, int64_t B, int64_t C, const RowMoments<compute_t<T>>& target) {
  const int64_t groups = groups_of(B, q.T_, C);
  const int64_t threads = torch::stable::get_num_threads();
  int64_t width = std::min(C, COLUMNS);
  while (threads > 1 && width > 64 && groups * ((C + width - 1) / width) < 3 * threads)
    width = (width / 2 + 15) / 16 * 16;
  const int64_t blocks = (C + width - 1) / width, work = (B + groups - 1) / groups * q.T_ * width;
  std::vector<double> sums(groups * C), firsts(target.first ? groups * C : 0);
  torch::stable::parallel_for(
      0, groups * blocks, std::max<int64_t>(1, GRAIN / std::max<int64_t>(work, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t group = task / blocks, c0 = task % blocks * width, at = group * C + c0;
          const RowMoments<double> moments{
              sums.data() + at, 1, target.first ? firsts.data() + at : nullptr, 1, target.absolute};
          const int64_t b0 = B * group / groups, b1 = B * (group + 1) / groups, columns = std::min(width, C - c0);
          if (q.x.data) {
            scale_task<true>(q, b0, b1, c0, columns, moments);
          } else {
            scale_task<false>(q, b0, b1, c0, columns, moments);
          }
        }
      });
  const auto add = [&](const std::vector<double>& values, compute_t<T>* to, int64_t stride) {
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t group = 0; group < groups; ++group) sum += values[group * C + c];
      to[c * stride] = compute_t<T>(to[c * stride] + sum);
    }
  };
  add(sums, target.out, target.out_stride);
  if (target.first) add(firsts, target.first, target.first_stride);
}

void sum_grad_squared_scale_(
    Tensor out, std::optional<Tensor> inputs, Tensor grad_outputs, std::optional<Tensor> weights,
    std::optional<Tensor> first, double scale, bool absolute) {
  STD_TORCH_CHECK(grad_outputs.dim() == 3, "grad_outputs must be [B, T, C]");
  if (inputs) {
    STD_TORCH_CHECK(same_shape(*inputs, grad_outputs), "inputs must have the shape of grad_outputs");
    STD_TORCH_CHECK(inputs->scalar_type() == grad_outputs.scalar_type(), "inputs must have the dtype of grad_outputs");
  }
  const int64_t B = grad_outputs.size(0), C = grad_outputs.size(2);
  STD_TORCH_CHECK(out.dim() == 1 && out.size(0) == C, "out must be [C]");
  check_moments(out, grad_outputs, weights, first);
  if (grad_outputs.numel() == 0) return;
  if (weights) weights = torch::stable::contiguous(*weights);
  dispatch_floating(grad_outputs.scalar_type(), "grad_outputs", [&](auto type) {
    using T = decltype(type);
    const ScaleProblem<T> problem{
        strided<T>(grad_outputs), inputs ? strided<T>(*inputs) : Strided<T>{}, grad_outputs.size(1),
        weights ? data<compute_t<T>>(*weights) : nullptr, scale};
    run(problem, B, C, moments_at<compute_t<T>>(out, first, absolute));
  });
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("sum_grad_squared_scale_", TORCH_BOX(&unlearn::sum_grad_squared_scale_));
}
