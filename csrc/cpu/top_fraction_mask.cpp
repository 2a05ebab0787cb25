// Registers top_fraction_mask for the CPU key.
#include "cpu/top_fraction_mask.h"

#include "cpu/dampen_tensors.h"

namespace unlearn {
namespace {

std::vector<Tensor> top_fraction_mask(std::vector<Tensor> scores, int64_t count) {
  std::vector<Tensor> masks;
  std::vector<ScoreTensor> tensors;
  bool wide = false;
  for (const Tensor& s : scores) {
    const Axes shape = shape_of(s);
    masks.push_back(torch::stable::empty(shape, ScalarType::Bool));
    ScoreTensor t{shape, strided(s, "scores"), s.numel(), mutable_data<bool>(masks.back())};
    merge_axes(t.shape, {&t.scores});
    wide = wide || t.scores.dtype == Float::float64;
    tensors.push_back(std::move(t));
  }
  STD_TORCH_CHECK(count >= 0, "count must be at least 0");
  const int64_t numbers = wide ? mark_largest<double>(tensors, count) : mark_largest<float>(tensors, count);
  STD_TORCH_CHECK(numbers >= count, "scores has ", numbers, " values that are not NaN: it must have ", count);
  return masks;
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) { m.impl("top_fraction_mask", TORCH_BOX(&unlearn::top_fraction_mask)); }
