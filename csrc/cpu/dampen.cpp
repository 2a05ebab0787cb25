// Registers dampen_ for the CPU key: one call for a whole list of parameters.
#include "cpu/dampen_tensors.h"

namespace unlearn {
namespace {

Tensor dampen_(
    std::vector<Tensor> params, std::vector<Tensor> forget, std::vector<Tensor> reference, std::vector<double> alpha,
    std::vector<double> lam, double exponent, double cap, double floor) {
  const std::vector<DampenTensor> tensors = dampen_tensors(params, forget, reference, alpha, lam);
  Tensor table = torch::stable::empty({int64_t(params.size()), 4}, ScalarType::Double);
  double* row = mutable_data<double>(table);
  for (const DampenStats& stats : dampen(tensors, {exponent, cap, floor})) {
    row[0] = double(stats.selected);
    row[1] = double(stats.non_finite);
    row[2] = double(stats.non_finite_selected);
    row[3] = stats.factor_sum;
    row += 4;
  }
  return table;
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) { m.impl("dampen_", TORCH_BOX(&unlearn::dampen_)); }
