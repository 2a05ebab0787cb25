// dampen_ on CUDA: p <- p * min((lam * r / f)^exponent, cap) where f > alpha * r, in place.
//
// Fused: selection, factor, product, and the report's counts. Reads f and r; reads and writes p only where selected.
// Work: one launch a tensor, a grid-stride loop over its elements in at most SLOTS blocks; each block writes its four
// counts to its own slot, and a last launch adds the slots in order: no atomics, so two runs give the same report.
// IEEE division, no flush to zero (nvcc's defaults): float32 results match the published formula bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

namespace unlearn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int THREADS = 256;
constexpr int64_t SLOTS = 1024;

struct Settings {
  double alpha, lam, exponent, cap;
};

template <class C, class T>
__device__ C widen(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return C(__bfloat162float(x));
  else if constexpr (std::is_same_v<T, __half>)
    return C(__half2float(x));
  else
    return C(x);
}

template <class T, class C>
__device__ T narrow(C x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(float(x));
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(float(x));
  else
    return T(x);
}

// torch computes these exponents without pow; see csrc/cpu/dampen.h.
template <class C>
__device__ C raised(C ratio, double exponent) {
  if (exponent == 1.0) return ratio;
  if (exponent == 0.5) return sqrt(ratio);
  if (exponent == 2.0) return ratio * ratio;
  if (exponent == 3.0) return ratio * ratio * ratio;
  return C(pow(double(ratio), exponent));
}

template <class P, class C>
__global__ void dampen_kernel(P* p, const C* f, const C* r, int64_t n, Settings settings, double* slots) {
  const C alpha = C(settings.alpha), lam = C(settings.lam), cap = C(settings.cap);
  double counts[4] = {0, 0, 0, 0};  // selected, non-finite importances, non-finite selected parameters, sum of factors
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += int64_t(gridDim.x) * THREADS) {
    const C fi = f[i], ri = r[i];
    if (!(isfinite(fi) && isfinite(ri))) counts[1] += 1;
    if (!(fi > ri * alpha)) continue;
    C factor = raised(C(ri * lam) / fi, settings.exponent);
    if (isinf(fi)) factor = C(0);  // lam * r may overflow, and inf / inf is no factor
    if (factor > cap) factor = cap;
    const C value = widen<C>(p[i]);
    p[i] = narrow<P>(value * factor);
    counts[0] += 1;
    counts[2] += isfinite(value) ? 0 : 1;
    counts[3] += double(factor);
  }
  __shared__ double shared[THREADS][4];
  for (int k = 0; k < 4; ++k) shared[threadIdx.x][k] = counts[k];
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      for (int k = 0; k < 4; ++k) shared[threadIdx.x][k] += shared[threadIdx.x + half][k];
    }
  }
  if (threadIdx.x == 0) {
    for (int k = 0; k < 4; ++k) slots[blockIdx.x * 4 + k] = shared[0][k];
  }
}

__global__ void add_slots(const double* slots, double* table) {
  if (threadIdx.x >= 4) return;
  double sum = 0;
  for (int64_t slot = 0; slot < SLOTS; ++slot) sum += slots[(blockIdx.x * SLOTS + slot) * 4 + threadIdx.x];
  table[blockIdx.x * 4 + threadIdx.x] = sum;
}

template <class F>
void dispatch_params(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, "params must be float32, float64, bfloat16 or float16");
  }
}

Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "dampen_ could not be launched: ", cudaGetErrorString(error));
}

template <class C>
void dampen_tensor(
    Tensor& param, const Tensor& forget, const Tensor& reference, const Settings& settings, double* slots,
    cudaStream_t stream) {
  const Tensor f = contiguous_as(forget, std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float);
  const Tensor r = contiguous_as(reference, f.scalar_type());
  Tensor p = torch::stable::contiguous(param);
  const int64_t n = p.numel(), blocks = std::min(SLOTS, (n + THREADS - 1) / THREADS);
  if (n == 0) return;
  dispatch_params(p.scalar_type(), [&](auto type) {
    using P = decltype(type);
    if constexpr (!(std::is_same_v<P, double> && std::is_same_v<C, float>)) {
      dampen_kernel<<<int(blocks), THREADS, 0, stream>>>(
          static_cast<P*>(p.mutable_data_ptr()), static_cast<const C*>(f.const_data_ptr()),
          static_cast<const C*>(r.const_data_ptr()), n, settings, slots);
    }
  });
  check_launch();
  if (p.const_data_ptr() != param.const_data_ptr()) torch::stable::copy_(param, p);
}

Tensor dampen_(
    std::vector<Tensor> params, std::vector<Tensor> forget, std::vector<Tensor> reference, double alpha, double lam,
    double exponent, double cap) {
  STD_TORCH_CHECK(
      params.size() == forget.size() && params.size() == reference.size(),
      "forget and reference must have as many tensors as params");
  const int64_t P = int64_t(params.size());
  if (P == 0) return torch::stable::empty({0, 4}, ScalarType::Double);
  for (int64_t i = 0; i < P; ++i) {
    STD_TORCH_CHECK(
        params[i].numel() == forget[i].numel() && params[i].numel() == reference[i].numel(), "importance ", i,
        " must have the shape of its parameter");
    STD_TORCH_CHECK(
        params[i].get_device_index() == params[0].get_device_index() &&
            params[i].get_device_index() == forget[i].get_device_index() &&
            params[i].get_device_index() == reference[i].get_device_index(),
        "all tensors must be on one device");
    dispatch_params(params[i].scalar_type(), [](auto) {});
  }
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(params[0].get_device_index(), &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Tensor slots = torch::stable::new_empty(params[0], {P, SLOTS, 4}, ScalarType::Double);
  torch::stable::zero_(slots);
  Tensor table = torch::stable::new_empty(params[0], {P, 4}, ScalarType::Double);
  const Settings settings{alpha, lam, exponent, cap};
  double* slot = static_cast<double*>(slots.mutable_data_ptr());
  for (int64_t i = 0; i < P; ++i, slot += SLOTS * 4) {
    const bool wide = params[i].scalar_type() == ScalarType::Double || forget[i].scalar_type() == ScalarType::Double ||
                      reference[i].scalar_type() == ScalarType::Double;
    if (wide)
      dampen_tensor<double>(params[i], forget[i], reference[i], settings, slot, cuda_stream);
    else
      dampen_tensor<float>(params[i], forget[i], reference[i], settings, slot, cuda_stream);
  }
  add_slots<<<int(P), 32, 0, cuda_stream>>>(
      static_cast<const double*>(slots.const_data_ptr()), static_cast<double*>(table.mutable_data_ptr()));
  check_launch();
  return table;
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CUDA, m) { m.impl("dampen_", TORCH_BOX(&unlearn::dampen_)); }
