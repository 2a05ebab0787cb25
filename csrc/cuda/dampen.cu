// dampen_ on CUDA: the operator. The kernels, and how their work is split, are in dampen.cuh.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "cuda/dampen.cuh"

namespace unlearn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "dampen_ could not be launched: ", cudaGetErrorString(error));
}

// f(T{}) for the type of a parameter or of an importance.
template <class F>
void dispatch(ScalarType dtype, const char* name, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

// As many blocks as the card holds at once.
template <class Kernel>
int blocks_of(Kernel kernel, int chunks) {
  int device = 0, processors = 0, resident = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, DAMPEN_THREADS, 0));
  return std::min(chunks, std::max(1, processors * resident));
}

template <class P, class F>
void launch(const DampenList& list, const DampenSettings& settings, double* slots, cudaStream_t stream) {
  using C = std::conditional_t<std::is_same_v<P, double> || std::is_same_v<F, double>, double, float>;
  const auto run = [&](auto kernel) {
    kernel<<<blocks_of(kernel, list.chunks), DAMPEN_THREADS, 0, stream>>>(list, settings, slots);
  };
  if (settings.exponent == 1.0)
    run(dampen_kernel<true, P, F, C>);
  else
    run(dampen_kernel<false, P, F, C>);
  check(cudaGetLastError());
}

// Tensors of one dtype, and importances of one dtype: their launches, each of at most DAMPEN_LIST tensors.
class Group {
 public:
  void add(const Tensor& p, const Tensor& f, const Tensor& r, double alpha, double lam, int row) {
    if (lists_.empty() || lists_.back().tensors == DAMPEN_LIST) lists_.emplace_back();
    DampenList& list = lists_.back();
    list.tensor[list.tensors++] = {
        p.mutable_data_ptr(), f.const_data_ptr(), r.const_data_ptr(), p.numel(), alpha, lam, list.chunks, row};
    list.chunks += dampen_chunks(p.numel());
  }

  int64_t chunks() const {
    int64_t sum = 0;
    for (const DampenList& list : lists_) sum += list.chunks;
    return sum;
  }

  // Returns the slots after its own.
  double* run(
      ScalarType params, ScalarType importances, const DampenSettings& settings, double* slots, double* table,
      cudaStream_t stream) const {
    for (const DampenList& list : lists_) {
      dispatch(params, "params", [&](auto p) {
        dispatch(importances, "importances", [&](auto f) {
          launch<decltype(p), decltype(f)>(list, settings, slots, stream);
        });
      });
      add_slots_kernel<<<list.tensors, DAMPEN_THREADS, 0, stream>>>(list, slots, table);
      check(cudaGetLastError());
      slots += int64_t(list.chunks) * DAMPEN_COUNTS;
    }
    return slots;
  }

 private:
  std::vector<DampenList> lists_;
};

Tensor dampen_(
    std::vector<Tensor> params, std::vector<Tensor> forget, std::vector<Tensor> reference, std::vector<double> alpha,
    std::vector<double> lam, double exponent, double cap, double floor) {
  STD_TORCH_CHECK(
      params.size() == forget.size() && params.size() == reference.size(),
      "forget and reference must have as many tensors as params");
  STD_TORCH_CHECK(
      alpha.size() == params.size() && lam.size() == params.size(), "alpha and lam must have one value a parameter");
  const int64_t P = int64_t(params.size());
  if (P == 0) return torch::stable::empty({0, DAMPEN_COUNTS}, ScalarType::Double);
  const auto device = params[0].get_device_index();
  for (int64_t i = 0; i < P; ++i) {
    STD_TORCH_CHECK(
        params[i].numel() == forget[i].numel() && params[i].numel() == reference[i].numel(), "importance ", i,
        " must have the shape of its parameter");
    STD_TORCH_CHECK(
        params[i].get_device_index() == device && forget[i].get_device_index() == device &&
            reference[i].get_device_index() == device,
        "all tensors must be on one device");
    dispatch(params[i].scalar_type(), "params", [](auto) {});
    for (const Tensor* x : {&forget[i], &reference[i]}) dispatch(x->scalar_type(), "importances", [](auto) {});
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &current) == AOTI_TORCH_SUCCESS, "no CUDA stream");
  const auto stream = static_cast<cudaStream_t>(current);

  std::map<std::pair<ScalarType, ScalarType>, Group> groups;
  std::vector<Tensor> kept;  // until the kernels are launched: torch's allocator then keeps to the stream's order
  std::vector<std::pair<int64_t, Tensor>> copies;  // of parameters that are not contiguous
  for (int64_t i = 0; i < P; ++i) {
    if (params[i].numel() == 0) continue;
    // Importances of one dtype are read as they are; of two, in the wider one that holds both.
    ScalarType dtype = forget[i].scalar_type();
    if (dtype != reference[i].scalar_type()) {
      const bool wide = dtype == ScalarType::Double || reference[i].scalar_type() == ScalarType::Double;
      dtype = wide ? ScalarType::Double : ScalarType::Float;
    }
    Tensor p = torch::stable::contiguous(params[i]);
    if (p.const_data_ptr() != params[i].const_data_ptr()) copies.emplace_back(i, p);
    kept.push_back(contiguous_as(forget[i], dtype));
    kept.push_back(contiguous_as(reference[i], dtype));
    groups[{params[i].scalar_type(), dtype}].add(p, kept[kept.size() - 2], kept.back(), alpha[i], lam[i], int(i));
  }

  int64_t chunks = 0;
  for (const auto& [dtypes, group] : groups) chunks += group.chunks();
  Tensor slots = torch::stable::new_empty(params[0], {chunks, DAMPEN_COUNTS}, ScalarType::Double);
  Tensor table = torch::stable::new_empty(params[0], {P, DAMPEN_COUNTS}, ScalarType::Double);
  torch::stable::zero_(table);  // empty tensors have rows, and no kernel
  const DampenSettings settings{exponent, cap, floor};
  double* slot = static_cast<double*>(slots.mutable_data_ptr());
  for (const auto& [dtypes, group] : groups) {
    slot =
        group.run(dtypes.first, dtypes.second, settings, slot, static_cast<double*>(table.mutable_data_ptr()), stream);
  }
  for (auto& [i, copy] : copies) torch::stable::copy_(params[i], copy);
  return table;
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CUDA, m) { m.impl("dampen_", TORCH_BOX(&unlearn::dampen_)); }
