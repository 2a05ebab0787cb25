// What the registrations of the operators over rows of logits share: checks, and the division of rows over threads.
#pragma once

#include <algorithm>

#include "cpu/rows.h"
#include "cpu/tensors.h"

namespace unlearn {

inline Tensor with_unit_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  return logits.stride(last) == 1 || logits.size(last) <= 1 ? logits : torch::stable::contiguous(logits);
}

inline void check_unit_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  STD_TORCH_CHECK(
      last >= 0 && (logits.stride(last) == 1 || logits.size(last) <= 1), "logits must have stride 1 on its last axis");
}

inline void check_labels(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
  STD_TORCH_CHECK(
      logits.dim() >= 1 && labels.dim() == logits.dim() - 1, "labels must have the shape of logits[..., 0]");
  int64_t rows = 1;
  for (int64_t d = 0; d < labels.dim(); ++d) {
    STD_TORCH_CHECK(labels.size(d) == logits.size(d), "labels must have the shape of logits[..., 0]");
    rows *= labels.size(d);
  }
  const int64_t V = logits.size(logits.dim() - 1);
  const int64_t* label = data<int64_t>(labels);
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(
        label[row] == ignore_index || (label[row] >= 0 && label[row] < V), "labels holds ", label[row], " at row ", row,
        ": a label must be in [0, ", V, ") or ignore_index (", ignore_index, ")");
  }
}

inline void check_scaling(double softcap, double temperature) {
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap must be finite and at least 0, which means none");
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature must be finite and above 0");
}

inline int64_t segments_of(int64_t V) { return std::max<int64_t>(1, (V + SEGMENT - 1) / SEGMENT); }

// Calls f(row, segment, begin, end) for every segment of N rows, spread over threads: few rows are split as well.
template <class F>
void for_segments(int64_t N, int64_t V, const F& f) {
  const int64_t segments = segments_of(V), size = std::clamp<int64_t>(V, 1, SEGMENT);
  torch::stable::parallel_for(0, N * segments, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t segment = item % segments;
      f(item / segments, segment, segment * SEGMENT, std::min(V, (segment + 1) * SEGMENT));
    }
  });
}

// Per row: add(row, begin, end, sums) for its segments, in any order and on any thread, then finish(row, sums) of what
// they merge to in their order.
template <class Sums, class Add, class Finish>
void reduce_rows(int64_t N, int64_t V, const Add& add, const Finish& finish) {
  const int64_t segments = segments_of(V);
  std::vector<Sums> parts(segments > 1 ? N * segments : 0);
  for_segments(N, V, [&](int64_t row, int64_t segment, int64_t begin, int64_t end) {
    Sums sums;
    add(row, begin, end, sums);
    if (segments == 1) {
      finish(row, sums);
    } else {
      parts[row * segments + segment] = sums;
    }
  });
  if (segments == 1) return;
  torch::stable::parallel_for(0, N, GRAIN / 64, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      Sums sums = parts[row * segments];
      for (int64_t segment = 1; segment < segments; ++segment) sums.merge(parts[row * segments + segment]);
      finish(row, sums);
    }
  });
}

}  // namespace unlearn
