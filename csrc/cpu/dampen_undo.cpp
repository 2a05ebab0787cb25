// Registers dampen_record and dampen_undo_ for the CPU key.
#include "cpu/dampen_undo.h"

#include <tuple>

#include "cpu/dampen_tensors.h"

namespace unlearn {
namespace {

// counts [runs]; offsets [changed]; values, the bytes of what is there now
std::tuple<Tensor, Tensor, Tensor> dampen_record(
    std::vector<Tensor> params, std::vector<Tensor> forget, std::vector<Tensor> reference, std::vector<double> alpha) {
  const std::vector<double>& lam = alpha;  // of no importance: no factor is computed
  const std::vector<DampenTensor> tensors = dampen_tensors(params, forget, reference, alpha, lam);
  WorkList work;
  for (const DampenTensor& t : tensors) work.add(t.n);
  const int64_t runs = int64_t(work.runs().size());
  std::vector<UndoRun> logs(runs);
  work.for_each([&](const Run& run, int64_t index) { logs[index] = record_run(tensors[run.tensor], run); });

  Tensor counts = torch::stable::empty({runs}, ScalarType::Long);
  std::vector<int64_t> offset_of(runs + 1), value_of(runs + 1);
  for (int64_t i = 0; i < runs; ++i) {
    mutable_data<int64_t>(counts)[i] = int64_t(logs[i].offsets.size());
    offset_of[i + 1] = offset_of[i] + int64_t(logs[i].offsets.size());
    value_of[i + 1] = value_of[i] + int64_t(logs[i].values.size());
  }
  Tensor offsets = torch::stable::empty({offset_of[runs]}, ScalarType::UInt16);
  Tensor values = torch::stable::empty({value_of[runs]}, ScalarType::Byte);
  advise_huge_pages(offsets);
  advise_huge_pages(values);
  work.for_each([&](const Run&, int64_t i) {
    std::copy(logs[i].offsets.begin(), logs[i].offsets.end(), mutable_data<uint16_t>(offsets) + offset_of[i]);
    std::copy(logs[i].values.begin(), logs[i].values.end(), mutable_data<char>(values) + value_of[i]);
    logs[i] = {};
  });
  return {counts, offsets, values};
}

void dampen_undo_(std::vector<Tensor> params, Tensor counts, Tensor offsets, Tensor values) {
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Long && offsets.scalar_type() == ScalarType::UInt16 &&
          values.scalar_type() == ScalarType::Byte,
      "counts, offsets and values must be what dampen_record gave: int64, uint16 and uint8");
  WorkList work;
  std::vector<Strided> tensors;
  std::vector<Axes> shapes;
  for (const Tensor& param : params) {
    tensors.push_back(strided(param, "params"));
    tensors.back().data = param.mutable_data_ptr();
    shapes.push_back(shape_of(param));
    merge_axes(shapes.back(), {&tensors.back()});
    work.add(param.numel());
  }
  const Tensor c = torch::stable::contiguous(counts), o = torch::stable::contiguous(offsets),
               v = torch::stable::contiguous(values);
  const int64_t runs = int64_t(work.runs().size());
  STD_TORCH_CHECK(c.numel() == runs, "counts must have one value for each run of params");
  std::vector<int64_t> offset_of(runs + 1), value_of(runs + 1);
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t n = data<int64_t>(c)[i];
    STD_TORCH_CHECK(n >= 0 && n <= work.runs()[i].count, "counts must be those of these params");
    offset_of[i + 1] = offset_of[i] + n;
    value_of[i + 1] = value_of[i] + n * width(tensors[work.runs()[i].tensor].dtype);
  }
  STD_TORCH_CHECK(
      o.numel() == offset_of[runs] && v.numel() == value_of[runs], "offsets and values must be those of these params");
  work.for_each([&](const Run& run, int64_t i) {
    undo_run(
        tensors[run.tensor], shapes[run.tensor], run, data<uint16_t>(o) + offset_of[i], offset_of[i + 1] - offset_of[i],
        data<char>(v) + value_of[i]);
  });
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("dampen_record", TORCH_BOX(&unlearn::dampen_record));
  m.impl("dampen_undo_", TORCH_BOX(&unlearn::dampen_undo_));
}
