// What the operators' registrations share: dtype dispatch, addressing of rows, threads, fresh memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/pages.h"
#include "cpu/scalar.h"

namespace unlearn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the C++ type that stores `dtype`.
template <class F>
void dispatch_floating(ScalarType dtype, const char* argument, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, argument, " must be float32, float64, bfloat16 or float16");
  }
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// What all sums over examples take: where they go, and a weight an example.
inline void check_moments(
    const Tensor& out, const Tensor& grad_outputs, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& first) {
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

// Addresses the last axis ("row") of a tensor whose leading axes may have any strides.
class RowOffsets {
 public:
  explicit RowOffsets(const Tensor& tensor) {
    for (int64_t d = 0; d + 1 < tensor.dim(); ++d) {
      sizes_.push_back(tensor.size(d));
      strides_.push_back(tensor.stride(d));
    }
  }
  int64_t operator()(int64_t row) const {
    int64_t offset = 0;
    for (size_t d = sizes_.size(); d-- > 0;) {
      offset += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return offset;
  }

 private:
  std::vector<int64_t> sizes_, strides_;
};

// Elements a thread should at least get, so that waking it pays.
constexpr int64_t GRAIN = 32768;

inline void advise_huge_pages(const Tensor& fresh) {
  advise_huge_pages(fresh.const_data_ptr(), fresh.numel() * fresh.element_size());
}

}  // namespace unlearn
