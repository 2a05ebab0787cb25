// Lists of torch's tensors as the loops over parameters and importances take them.
#pragma once

#include "cpu/dampen.h"
#include "cpu/importances.h"
#include "cpu/tensors.h"

namespace unlearn {

inline Float float_dtype(ScalarType dtype, const char* argument) {
  switch (dtype) {
    case ScalarType::Float: return Float::float32;
    case ScalarType::Double: return Float::float64;
    case ScalarType::BFloat16: return Float::bfloat16;
    case ScalarType::Half: return Float::float16;
    default: STD_TORCH_CHECK(false, argument, " must be float32, float64, bfloat16 or float16");
  }
}

// To read; who writes asks for mutable_data_ptr.
inline Strided strided(const Tensor& tensor, const char* argument) {
  Strided t{nullptr, float_dtype(tensor.scalar_type(), argument), {}};
  t.data = const_cast<void*>(tensor.const_data_ptr());
  const auto strides = tensor.strides();
  t.strides.assign(strides.begin(), strides.end());
  return t;
}

inline Axes shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Axes(sizes.begin(), sizes.end());
}

inline void check_same_shapes(const std::vector<Tensor>& a, const std::vector<Tensor>& b, const char* message) {
  STD_TORCH_CHECK(a.size() == b.size(), message);
  for (size_t i = 0; i < a.size(); ++i) STD_TORCH_CHECK(same_shape(a[i], b[i]), message);
}

inline std::vector<DampenTensor> dampen_tensors(
    const std::vector<Tensor>& params, const std::vector<Tensor>& forget, const std::vector<Tensor>& reference,
    const std::vector<double>& alpha, const std::vector<double>& lam) {
  check_same_shapes(params, forget, "forget must have the shapes of params");
  check_same_shapes(params, reference, "reference must have the shapes of params");
  STD_TORCH_CHECK(
      alpha.size() == params.size() && lam.size() == params.size(), "alpha and lam must have one value a parameter");
  std::vector<DampenTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    DampenTensor t{
        shape_of(params[i]),
        strided(params[i], "params"),
        strided(forget[i], "forget"),
        strided(reference[i], "reference"),
        params[i].numel(),
        alpha[i],
        lam[i]};
    t.p.data = params[i].mutable_data_ptr();
    merge_axes(t.shape, {&t.p, &t.f, &t.r});
    tensors.push_back(std::move(t));
  }
  return tensors;
}

inline std::vector<Importances> importances(const std::vector<Tensor>& forget, const std::vector<Tensor>& reference) {
  check_same_shapes(forget, reference, "reference must have the shapes of forget");
  std::vector<Importances> tensors;
  for (size_t i = 0; i < forget.size(); ++i) {
    Importances t{
        shape_of(forget[i]), strided(forget[i], "forget"), strided(reference[i], "reference"), forget[i].numel()};
    merge_axes(t.shape, {&t.f, &t.r});
    tensors.push_back(std::move(t));
  }
  return tensors;
}

}  // namespace unlearn
