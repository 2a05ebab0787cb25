// The squared per-example weight gradients of a depthwise convolution, one input channel a group; see
// sum_grad_squared_conv.h:
//   G_b[c, k] = sum_p g[b, c, p] * x[b, c, p * stride + k * dilation - padding]
//
// No matrix product: each channel is one lane of a vector. A task packs the gradients and the part of the image that a
// few hundred positions need, channels innermost, and multiplies them at several kernel offsets at a time.
// Work: a strip of channels a task, for each output channel of a group. Reads g once and x once for each of those.
#pragma once

#include "cpu/sum_grad_squared_conv.h"

namespace unlearn {

// For each example of the panel: [KR, 2 vectors] = sum over t of a[row(t) + offset] * g[t], then the epilogue.
template <int BYTES, int KR, class C>
UNLEARN_INLINE void depthwise_micro_tile(
    const Panel<C>& panel, const int32_t* rows, const int64_t* offsets, const C* weights, C* product, C* sum,
    C* first) {
  typedef C V __attribute__((vector_size(BYTES), aligned(sizeof(C)), may_alias));
  constexpr int lanes = BYTES / sizeof(C);
  const C *a = panel.a, *g = panel.g;
  for (int64_t e = 0; e < panel.examples; ++e, a += panel.a_example, g += panel.g_example) {
    V acc[KR][2] = {};
    const C* grads = g;
    for (int64_t t = 0; t < panel.T; ++t, grads += 2 * lanes) {
      const V g0 = *reinterpret_cast<const V*>(grads), g1 = *reinterpret_cast<const V*>(grads + lanes);
      const C* row = a + rows[t];
#pragma GCC unroll 16
      for (int k = 0; k < KR; ++k) {
        acc[k][0] += g0 * *reinterpret_cast<const V*>(row + offsets[k]);
        acc[k][1] += g1 * *reinterpret_cast<const V*>(row + offsets[k] + lanes);
      }
    }
    const C weight = weights ? weights[panel.example + e] : C(1);
    epilogue<BYTES>(acc, panel, weight, product, sum, first, 2 * lanes);
  }
}

// Groups [group0, group0 + a strip), output channel m of each. `q.together` examples share a panel.
template <class T>
struct DepthwiseWork {
  using C = compute_t<T>;
  const Convolution<T>& q;
  int64_t group0, m;
  Workspace<C>& w;

  template <int BYTES, int MR>
  UNLEARN_INLINE void run() const {
    constexpr int64_t NR = 2 * BYTES / sizeof(C);
    constexpr int KR = MR == 12 ? 9 : 3;
    const int64_t count = std::min(NR, q.groups - group0), padded = (q.K + KR - 1) / KR * KR;
    std::fill(w.sum, w.sum + padded * NR, C(0));
    std::fill(w.first, w.first + padded * NR, C(0));
    for (int64_t step = 0; step < q.steps(); ++step) {
      Box box;
      RegionState state;
      Panel<C> panel = q.panel(step, box);
      state.set(q.axes, box, NR);
      panel.a = w.a;
      panel.g = w.g;
      panel.a_example = state.size;
      panel.g_example = panel.T * NR;
      for (int64_t e = 0; e < panel.examples; ++e) {
        const int64_t b = panel.example + e;
        q.template pack_x<NR>(q.x + b * q.x_b + group0 * q.x_c, box, count, w.a + e * panel.a_example);
        const T* grads = q.g + b * q.g_b + (group0 * q.out_channels + m) * q.g_o;
        q.template pack_g<NR>(grads, q.out_channels * q.g_o, box, count, 0, w.g + e * panel.g_example);
      }
      for (int64_t k0 = 0; k0 < q.K; k0 += KR) {
        int64_t offsets[KR];
        for (int k = 0; k < KR; ++k) offsets[k] = state.kernel_offset(q.axes, std::min(k0 + k, q.K - 1));
        depthwise_micro_tile<BYTES, KR>(
            panel, state.rows, offsets, q.moments.weights, w.product + k0 * NR, w.sum + k0 * NR,
            q.moments.first ? w.first + k0 * NR : nullptr);
      }
    }
    write<NR>(w.sum, count, q.moments.out);
    if (q.moments.first) write<NR>(w.first, count, q.moments.first);
  }

  template <int64_t NR>
  UNLEARN_INLINE void write(const C* sum, int64_t count, C* target) const {
    for (int64_t c = 0; c < count; ++c) {
      C* out = target + ((group0 + c) * q.out_channels + m) * q.K;
      for (int64_t k = 0; k < q.K; ++k) out[k] += q.moments.scale * sum[k * NR + c];
    }
  }
};

}  // namespace unlearn
