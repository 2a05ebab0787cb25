// What the registrations of the operators over `moments.h` share: pointers of their common arguments.
#pragma once

#include <optional>

#include "cpu/moments.h"
#include "cpu/tensors.h"

namespace unlearn {

template <class T>
Strided<T> strided(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// The first row of out and first; their columns are the last axis.
template <class C>
RowMoments<C> moments_at(const Tensor& out, const std::optional<Tensor>& first, bool absolute) {
  const int64_t last = out.dim() - 1;
  return {
      mutable_data<C>(out), out.stride(last), first ? mutable_data<C>(*first) : nullptr,
      first ? first->stride(last) : 0, absolute};
}

}  // namespace unlearn
