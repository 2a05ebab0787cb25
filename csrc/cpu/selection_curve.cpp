// Registers selection_curve for the CPU key.
#include "cpu/selection_curve.h"

#include "cpu/dampen_tensors.h"

namespace unlearn {
namespace {

Tensor selection_curve(std::vector<Tensor> forget, std::vector<Tensor> reference, std::vector<double> alphas) {
  const std::vector<Importances> tensors = importances(forget, reference);
  Tensor table = torch::stable::empty({int64_t(tensors.size()), int64_t(alphas.size())}, ScalarType::Long);
  const std::vector<int64_t> counts = count_selections(tensors, alphas);
  std::copy(counts.begin(), counts.end(), mutable_data<int64_t>(table));
  return table;
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) { m.impl("selection_curve", TORCH_BOX(&unlearn::selection_curve)); }
