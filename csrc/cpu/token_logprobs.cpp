// Registers token_logprobs and its two backward forms for the CPU key. Rows are spread over torch's threads.
#include "cpu/token_logprobs.h"

#include <algorithm>
#include <tuple>

#include "cpu/tensors.h"

namespace unlearn {
namespace {

Tensor with_unit_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  return logits.stride(last) == 1 || logits.size(last) <= 1 ? logits : torch::stable::contiguous(logits);
}

void check_labels(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
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

int64_t rows_per_thread(int64_t V) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(V, 1)); }

std::tuple<Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor labels, int64_t ignore_index) {
  logits = with_unit_rows(logits);
  labels = contiguous_as(labels, ScalarType::Long);
  check_labels(logits, labels, ignore_index);
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  Tensor logp = torch::stable::new_empty(logits, labels.sizes(), dtype);
  Tensor row_max = torch::stable::empty_like(logp), log_sum = torch::stable::empty_like(logp);
  const int64_t V = logits.size(logits.dim() - 1), N = labels.numel();
  const RowOffsets offset(logits);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const T* x = data<T>(logits);
    const int64_t* label = data<int64_t>(labels);
    C *logp_out = mutable_data<C>(logp), *max_out = mutable_data<C>(row_max), *sum_out = mutable_data<C>(log_sum);
    torch::stable::parallel_for(0, N, rows_per_thread(V), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        RowResult<C> result{0, 0, 0};
        if (label[row] != ignore_index) result = logprob_row(x + offset(row), V, label[row]);
        logp_out[row] = result.logp;
        max_out[row] = result.max;
        sum_out[row] = result.log_sum;
      }
    });
  });
  return {logp, row_max, log_sum};
}

void backward_into(
    Tensor out, Tensor grad, const Tensor& logits, Tensor labels, const Tensor& logp, const Tensor& row_max,
    const Tensor& log_sum, int64_t ignore_index) {
  labels = contiguous_as(labels, ScalarType::Long);
  check_labels(logits, labels, ignore_index);
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const int64_t V = logits.size(logits.dim() - 1), N = labels.numel();
  STD_TORCH_CHECK(
      grad.numel() == N && logp.numel() == N && row_max.numel() == N && log_sum.numel() == N,
      "grad, logp, row_max and log_sum must have the shape of labels");
  grad = contiguous_as(grad, dtype);
  const Tensor logp_rows = contiguous_as(logp, dtype), max_rows = contiguous_as(row_max, dtype),
               sum_rows = contiguous_as(log_sum, dtype);
  const RowOffsets offset(logits), out_offset(out);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const T* x = data<T>(logits);
    T* dx = mutable_data<T>(out);
    const int64_t* label = data<int64_t>(labels);
    const C *g = data<C>(grad), *lp = data<C>(logp_rows), *m = data<C>(max_rows), *ls = data<C>(sum_rows);
    torch::stable::parallel_for(0, N, rows_per_thread(V), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* dx_row = dx + out_offset(row);
        if (label[row] == ignore_index) {
          std::fill(dx_row, dx_row + V, T{});
        } else {
          logprob_row_backward(x + offset(row), dx_row, V, label[row], g[row], RowResult<C>{lp[row], m[row], ls[row]});
        }
      }
    });
  });
}

Tensor token_logprobs_backward(
    Tensor grad, Tensor logits, Tensor labels, Tensor logp, Tensor row_max, Tensor log_sum, int64_t ignore_index) {
  logits = with_unit_rows(logits);
  Tensor out = torch::stable::new_empty(logits, logits.sizes());
  advise_huge_pages(out);
  backward_into(out, grad, logits, labels, logp, row_max, log_sum, ignore_index);
  return out;
}

void token_logprobs_backward_(
    Tensor grad, Tensor logits, Tensor labels, Tensor logp, Tensor row_max, Tensor log_sum, int64_t ignore_index) {
  const int64_t last = logits.dim() - 1;
  STD_TORCH_CHECK(
      last >= 0 && (logits.stride(last) == 1 || logits.size(last) <= 1), "logits must have stride 1 on its last axis");
  backward_into(logits, grad, logits, labels, logp, row_max, log_sum, ignore_index);
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&unlearn::token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&unlearn::token_logprobs_backward));
  m.impl("token_logprobs_backward_", TORCH_BOX(&unlearn::token_logprobs_backward_));
}
