// What the registrations of the operators over `moments.h` share: checks and pointers of their common arguments.
#pragma once

#include <optional>

#include "cpu/moments.h"
#include "cpu/tensors.h"

namespace unlearn {

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline void check_moments(
    const Tensor& out, const std::optional<Tensor>& first, const std::optional<Tensor>& weights,
    const Tensor& grad_outputs) {
  STD_TORCH_CHECK(
      out.scalar_type() == compute_dtype(grad_outputs.scalar_type()),
      "out must be float32, or float64 for float64 grad_outputs");
  STD_TORCH_CHECK(
      !weights || (weights->dim() == 1 && weights->size(0) == grad_outputs.size(0) &&
                   weights->scalar_type() == out.scalar_type()),
      "weights must be [B] in out's dtype");
  STD_TORCH_CHECK(
      !first || (same_shape(*first, out) && first->scalar_type() == out.scalar_type()),
      "first must have the shape and dtype of out");
}

template <class T>
Strided<T> strided(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// The first row of out and first; their columns are the last axis.
template <class C>
Moments<C> moments_at(const Tensor& out, const std::optional<Tensor>& first, bool absolute) {
  const int64_t last = out.dim() - 1;
  return {
      mutable_data<C>(out), out.stride(last), first ? mutable_data<C>(*first) : nullptr,
      first ? first->stride(last) : 0, absolute};
}

}  // namespace unlearn
