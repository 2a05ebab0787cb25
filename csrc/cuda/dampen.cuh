// dampen_ on CUDA, the kernels: p <- p * min((lam * r / f)^exponent, cap), not below floor * p, where f > alpha * r.
//
// Fused: selection, factor, product, and the report's counts. Reads f and r; reads and writes p only in the vectors in
// which something is selected.
// Work: one launch serves a list of tensors, which travels in the kernel's arguments. Tensors are cut into chunks; each
// block takes every gridDim-th chunk, so that many small tensors fill the card as one large one does. Vectors of 16
// bytes, several in flight a thread; the elements before the first whole vector and after the last are taken one by one,
// as is all of a tensor whose p, f and r cannot be aligned together.
// A chunk's counts go to a slot of its own, and a second kernel adds a tensor's slots in order: no atomics, so two runs
// give the same report.
// IEEE division, no flush to zero (nvcc's defaults): float32 results match the published formula bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace unlearn {

constexpr int DAMPEN_THREADS = 256;
constexpr int64_t DAMPEN_CHUNK = 1 << 16;  // elements
constexpr int DAMPEN_COUNTS = 4;           // selected, non-finite importances, non-finite selected parameters, factors

struct DampenSettings {
  double exponent, cap, floor;
};

struct DampenTensor {
  void* p;
  const void *f, *r;
  int64_t n;
  double alpha, lam;
  int first;  // its first chunk, counted from the list's
  int row;    // of the table
};

// Arguments of a kernel may take 4 KB, from CUDA 12.1 on 32 KB less a few bytes.
#if CUDART_VERSION >= 12010
constexpr int DAMPEN_LIST = 576;
#else
constexpr int DAMPEN_LIST = 70;
#endif

struct DampenList {
  int tensors = 0, chunks = 0;
  DampenTensor tensor[DAMPEN_LIST];
};
static_assert(sizeof(DampenList) + sizeof(DampenSettings) + 64 <= (CUDART_VERSION >= 12010 ? 32764 : 4096));

inline __host__ __device__ int dampen_chunks(int64_t n) { return int((n + DAMPEN_CHUNK - 1) / DAMPEN_CHUNK); }

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

// torch computes these exponents without pow; see csrc/cpu/dampen.h. LINEAR: the exponent is 1.
template <bool LINEAR, class C>
__device__ C raised(C ratio, double exponent) {
  if (LINEAR) return ratio;
  if (exponent == 0.5) return sqrt(ratio);
  if (exponent == 2.0) return ratio * ratio;
  if (exponent == 3.0) return ratio * ratio * ratio;
  return C(pow(double(ratio), exponent));
}

// A tensor's, in the type that it is computed in.
template <class C>
struct Factors {
  C alpha, lam, cap, floor;
  double exponent;
};

struct DampenCounts {
  unsigned selected = 0, non_finite = 0, non_finite_selected = 0;  // of a chunk
  double factors = 0;
};

// Whether an element is selected, and its factor.
template <bool LINEAR, class C>
__device__ bool selects(C f, C r, const Factors<C>& settings, DampenCounts& counts, C& factor) {
  if (!(isfinite(f) && isfinite(r))) ++counts.non_finite;
  if (!(f > r * settings.alpha)) return false;
  factor = raised<LINEAR>(C(r * settings.lam) / f, settings.exponent);
  if (isinf(f)) factor = C(0);  // lam * r may overflow, and inf / inf is no factor
  if (factor > settings.cap) factor = settings.cap;
  if (factor < settings.floor) factor = settings.floor;
  ++counts.selected;
  counts.factors += double(factor);
  return true;
}

template <class P, class C>
__device__ P dampened(P p, C factor, DampenCounts& counts) {
  const C value = widen<C>(p);
  if (!isfinite(value)) ++counts.non_finite_selected;
  return narrow<P>(value * factor);
}

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T at[N];
};

template <class T, int N>
__device__ bool is_aligned(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % alignof(Vector<T, N>) == 0;
}

// Elements begin to end of one tensor, by the block's threads.
template <bool LINEAR, class P, class F, class C>
__device__ void dampen_elements(
    P* p, const F* f, const F* r, int64_t begin, int64_t end, const Factors<C>& settings, DampenCounts& counts) {
  for (int64_t i = begin + threadIdx.x; i < end; i += DAMPEN_THREADS) {
    C factor;
    if (selects<LINEAR>(widen<C>(f[i]), widen<C>(r[i]), settings, counts, factor)) {
      p[i] = dampened(p[i], factor, counts);
    }
  }
}

// Whole vectors of one tensor, of which the first begins at element 0 of p, f and r.
template <bool LINEAR, int N, int UNROLL, class P, class F, class C>
__device__ void dampen_vectors(
    P* p, const F* f, const F* r, int64_t vectors, const Factors<C>& settings, DampenCounts& counts) {
  const auto* fs = reinterpret_cast<const Vector<F, N>*>(f);
  const auto* rs = reinterpret_cast<const Vector<F, N>*>(r);
  auto* ps = reinterpret_cast<Vector<P, N>*>(p);
  for (int64_t start = threadIdx.x; start < vectors; start += UNROLL * DAMPEN_THREADS) {
    Vector<F, N> fv[UNROLL], rv[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t i = start + u * DAMPEN_THREADS;
      if (i < vectors) fv[u] = fs[i], rv[u] = rs[i];
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t i = start + u * DAMPEN_THREADS;
      if (i >= vectors) break;
      C factor[N];
      bool selected[N], any = false;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        selected[k] = selects<LINEAR>(widen<C>(fv[u].at[k]), widen<C>(rv[u].at[k]), settings, counts, factor[k]);
        any |= selected[k];
      }
      if (!any) continue;
      Vector<P, N> pv = ps[i];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (selected[k]) pv.at[k] = dampened(pv.at[k], factor[k], counts);
      }
      ps[i] = pv;
    }
  }
}

// The counts of all threads, added in a fixed order, to a slot.
__device__ inline void store_counts(const DampenCounts& counts, double* slot) {
  __shared__ double shared[DAMPEN_THREADS / 32][DAMPEN_COUNTS];
  double sums[DAMPEN_COUNTS] = {
      double(counts.selected), double(counts.non_finite), double(counts.non_finite_selected), counts.factors};
#pragma unroll
  for (int k = 0; k < DAMPEN_COUNTS; ++k) {
    for (int lanes = 16; lanes > 0; lanes /= 2) sums[k] += __shfl_down_sync(0xffffffffu, sums[k], lanes);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][k] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x < DAMPEN_COUNTS) {
    double sum = 0;
    for (int warp = 0; warp < DAMPEN_THREADS / 32; ++warp) sum += shared[warp][threadIdx.x];
    slot[threadIdx.x] = sum;
  }
  __syncthreads();  // before the next chunk's
}

template <bool LINEAR, class P, class F, class C>
__global__ void __launch_bounds__(DAMPEN_THREADS, LINEAR ? 0 : 2)  // room for pow's registers; 0: as usual
    dampen_kernel(const __grid_constant__ DampenList list, const DampenSettings shared, double* slots) {
  constexpr int SMALLER = sizeof(P) < sizeof(F) ? sizeof(P) : sizeof(F);
  // Elements of a vector: 16 bytes of the narrower type, but no more than registers hold in double.
  constexpr int N = 16 / SMALLER < int(32 / sizeof(C)) ? 16 / SMALLER : int(32 / sizeof(C));
  constexpr int UNROLL = sizeof(F) * N > 32 || sizeof(C) == 8 ? 1 : sizeof(F) * N > 16 ? 2 : 4;  // in flight
  for (int chunk = blockIdx.x; chunk < list.chunks; chunk += gridDim.x) {
    int low = 0, high = list.tensors;  // the last tensor whose first chunk is not beyond this one
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (list.tensor[middle].first <= chunk ? low : high) = middle;
    }
    const DampenTensor& tensor = list.tensor[low];
    auto* p = static_cast<P*>(tensor.p);
    const auto *f = static_cast<const F*>(tensor.f), *r = static_cast<const F*>(tensor.r);
    int64_t begin = int64_t(chunk - tensor.first) * DAMPEN_CHUNK;
    int64_t end = begin + DAMPEN_CHUNK < tensor.n ? begin + DAMPEN_CHUNK : tensor.n;
    const Factors<C> settings{C(tensor.alpha), C(tensor.lam), C(shared.cap), C(shared.floor), shared.exponent};
    DampenCounts counts;
    // Chunks hold whole vectors, so that what is aligned at this one's start is at all others'.
    const int64_t past = reinterpret_cast<uintptr_t>(p) % alignof(Vector<P, N>) / sizeof(P);
    const int64_t lead = past == 0 ? 0 : alignof(Vector<P, N>) / sizeof(P) - past;
    const int64_t inner = begin + lead < end ? begin + lead : end;
    if (is_aligned<F, N>(f + inner) && is_aligned<F, N>(r + inner)) {
      dampen_elements<LINEAR, P, F, C>(p, f, r, begin, inner, settings, counts);
      const int64_t vectors = (end - inner) / N;
      dampen_vectors<LINEAR, N, UNROLL, P, F, C>(p + inner, f + inner, r + inner, vectors, settings, counts);
      begin = inner + vectors * N;
    }
    dampen_elements<LINEAR, P, F, C>(p, f, r, begin, end, settings, counts);
    store_counts(counts, slots + int64_t(chunk) * DAMPEN_COUNTS);
  }
}

// One block a tensor of the list: its slots, added in order, to its row of the table.
__global__ void __launch_bounds__(DAMPEN_THREADS)
    add_slots_kernel(const __grid_constant__ DampenList list, const double* slots, double* table) {
  const DampenTensor& tensor = list.tensor[blockIdx.x];
  const int k = threadIdx.x % DAMPEN_COUNTS, chunks = dampen_chunks(tensor.n);
  double sum = 0;
  for (int chunk = threadIdx.x / DAMPEN_COUNTS; chunk < chunks; chunk += DAMPEN_THREADS / DAMPEN_COUNTS) {
    sum += slots[int64_t(tensor.first + chunk) * DAMPEN_COUNTS + k];
  }
  __shared__ double shared[DAMPEN_THREADS];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= DAMPEN_COUNTS) return;
  for (int other = threadIdx.x + DAMPEN_COUNTS; other < DAMPEN_THREADS; other += DAMPEN_COUNTS) sum += shared[other];
  table[int64_t(tensor.row) * DAMPEN_COUNTS + k] = sum;
}

}  // namespace unlearn
