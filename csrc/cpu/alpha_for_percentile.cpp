// Registers alpha_for_percentile for the CPU key.
#include "cpu/alpha_for_percentile.h"

#include <tuple>

#include "cpu/dampen_tensors.h"

namespace unlearn {
namespace {

std::tuple<Tensor, Tensor> alpha_for_percentile(
    std::vector<Tensor> forget, std::vector<Tensor> reference, std::vector<double> q) {
  const std::vector<Importances> tensors = importances(forget, reference);
  for (const double percent : q) STD_TORCH_CHECK(percent >= 0 && percent <= 100, "q must be between 0 and 100");
  const bool wide = std::any_of(tensors.begin(), tensors.end(), [](const Importances& t) { return t.wide(); });
  Tensor neighbours = torch::stable::empty({int64_t(q.size()), 2}, ScalarType::Double);
  Tensor count = torch::stable::empty({}, ScalarType::Long);
  double* row = mutable_data<double>(neighbours);
  int64_t& n = *mutable_data<int64_t>(count);
  for (const Neighbours& pair :
       wide ? ratio_neighbours<double>(tensors, q, n) : ratio_neighbours<float>(tensors, q, n)) {
    *row++ = pair.below;
    *row++ = pair.above;
  }
  return {neighbours, count};
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("alpha_for_percentile", TORCH_BOX(&unlearn::alpha_for_percentile));
}
