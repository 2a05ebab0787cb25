// Registers dampen_ for the CPU key: one call for a whole list of parameters.
#include "cpu/dampen.h"

#include "cpu/tensors.h"

namespace unlearn {
namespace {

template <class C>
DampenStats dampen_tensor(
    Tensor& param, const Tensor& forget, const Tensor& reference, const DampenSettings& settings) {
  const Tensor f = contiguous_as(forget, std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float);
  const Tensor r = contiguous_as(reference, f.scalar_type());
  Tensor p = torch::stable::contiguous(param);  // the parameter itself where it already is
  DampenStats stats;
  dispatch_floating(p.scalar_type(), "params", [&](auto type) {
    using P = decltype(type);
    if constexpr (std::is_same_v<P, double> && std::is_same_v<C, float>) {
      STD_TORCH_CHECK(false, "unreachable: float64 parameters are computed in float64");
    } else {
      stats = dampen_array(mutable_data<P>(p), data<C>(f), data<C>(r), p.numel(), settings);
    }
  });
  if (p.const_data_ptr() != param.const_data_ptr()) torch::stable::copy_(param, p);
  return stats;
}

Tensor dampen_(
    std::vector<Tensor> params, std::vector<Tensor> forget, std::vector<Tensor> reference, double alpha, double lam,
    double exponent, double cap) {
  STD_TORCH_CHECK(
      params.size() == forget.size() && params.size() == reference.size(),
      "forget and reference must have as many tensors as params");
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(
        same_shape(params[i], forget[i]) && same_shape(params[i], reference[i]), "importance ", i,
        " must have the shape of its parameter");
    dispatch_floating(params[i].scalar_type(), "params", [](auto) {});
  }
  const DampenSettings settings{alpha, lam, exponent, cap};
  Tensor table = torch::stable::empty({int64_t(params.size()), 4}, ScalarType::Double);
  double* row = mutable_data<double>(table);
  for (size_t i = 0; i < params.size(); ++i, row += 4) {
    const bool wide = params[i].scalar_type() == ScalarType::Double || forget[i].scalar_type() == ScalarType::Double ||
                      reference[i].scalar_type() == ScalarType::Double;
    const DampenStats stats = wide ? dampen_tensor<double>(params[i], forget[i], reference[i], settings)
                                   : dampen_tensor<float>(params[i], forget[i], reference[i], settings);
    row[0] = double(stats.selected);
    row[1] = double(stats.non_finite);
    row[2] = double(stats.non_finite_selected);
    row[3] = stats.factor_sum;
  }
  return table;
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) { m.impl("dampen_", TORCH_BOX(&unlearn::dampen_)); }
