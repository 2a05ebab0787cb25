// Registers token_logprobs and its two backward forms for the CPU key. Segments of rows are spread over torch's threads.
#include "cpu/token_logprobs.h"

#include <tuple>

#include "cpu/row_tensors.h"

namespace unlearn {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs token_logprobs(
    Tensor logits, Tensor labels, int64_t ignore_index, double softcap, double temperature, bool statistics) {
  check_scaling(softcap, temperature);
  logits = with_unit_rows(logits);
  labels = contiguous_as(labels, ScalarType::Long);
  check_labels(logits, labels, ignore_index);
  const int64_t V = logits.size(logits.dim() - 1), N = labels.numel();
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const std::vector<int64_t> nothing{0};
  Tensor outputs[6];
  for (int i = 0; i < 6; ++i) {
    outputs[i] = i < 3 || statistics ? torch::stable::new_empty(logits, labels.sizes(), dtype)
                                     : torch::stable::new_empty(logits, nothing, dtype);
  }
  const RowOffsets offset(logits);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const Scaling<C> scaling(softcap, temperature);
    const T* x = data<T>(logits);
    const int64_t* label = data<int64_t>(labels);
    C* out[6];
    for (int i = 0; i < 6; ++i) out[i] = mutable_data<C>(outputs[i]);
    const auto add = [&](int64_t row, int64_t begin, int64_t end, RowSums<C>& sums) {
      if (label[row] == ignore_index) return;
      const T* x_row = x + offset(row);
      if (statistics) return add_segment<true>(x_row, begin, end, label[row], scaling, sums);
      add_segment<false>(x_row, begin, end, label[row], scaling, sums);
    };
    const auto finish = [&](int64_t row, const RowSums<C>& sums) {
      RowResult<C> result{};
      if (label[row] != ignore_index) result = row_result(sums, V);
      const C values[6] = {result.logp, result.max, result.log_sum, result.entropy, result.mean, result.hit};
      for (int i = 0; i < (statistics ? 6 : 3); ++i) out[i][row] = values[i];
    };
    reduce_rows<RowSums<C>>(N, V, add, finish);
  });
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4], outputs[5]};
}

// A value a row in the computing dtype; 0 for all where the tensor is missing.
template <class C>
class RowValues {
 public:
  RowValues(const OptionalTensor& tensor, int64_t N, ScalarType dtype, const char* name) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->numel() == N, name, " must have the shape of labels");
    tensor_ = contiguous_as(*tensor, dtype);
    values_ = data<C>(*tensor_);
  }
  C operator[](int64_t row) const { return values_ ? values_[row] : C(0); }
  explicit operator bool() const { return values_ != nullptr; }

 private:
  OptionalTensor tensor_;
  const C* values_ = nullptr;
};

void backward_into(
    Tensor out, const Tensor& grad_logp, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
    const OptionalTensor& grad_mean, const Tensor& logits, Tensor labels, const Tensor& logp, const Tensor& row_max,
    const Tensor& log_sum, const Tensor& entropy, int64_t ignore_index, double softcap, double temperature) {
  check_scaling(softcap, temperature);
  labels = contiguous_as(labels, ScalarType::Long);
  check_labels(logits, labels, ignore_index);
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const int64_t V = logits.size(logits.dim() - 1), N = labels.numel();
  const OptionalTensor entropies = grad_entropy ? OptionalTensor(entropy) : std::nullopt;
  const RowOffsets offset(logits), out_offset(out);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const Scaling<C> scaling(softcap, temperature);
    const T* x = data<T>(logits);
    T* dx = mutable_data<T>(out);
    const int64_t* label = data<int64_t>(labels);
    const RowValues<C> g(grad_logp, N, dtype, "grad_logp"), l(grad_lse, N, dtype, "grad_lse"),
        h(grad_entropy, N, dtype, "grad_entropy"), m(grad_mean, N, dtype, "grad_mean"), lp(logp, N, dtype, "logp"),
        max(row_max, N, dtype, "row_max"), sum(log_sum, N, dtype, "log_sum"), H(entropies, N, dtype, "entropy");
    const bool plain = scaling.plain() && !l && !h && !m;
    for_segments(N, V, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
      const T* x_row = x + offset(row);
      T* dx_row = dx + out_offset(row);
      const RowResult<C> saved{lp[row], max[row], sum[row], H[row], 0, 0};
      if (label[row] == ignore_index) {
        std::fill(dx_row + begin, dx_row + end, T{});
      } else if (plain) {
        plain_gradient_segment(x_row, dx_row, begin, end, label[row], g[row], saved);
      } else {
        const RowCotangents<C> grads{g[row], l[row], h[row], m[row] / C(V)};
        gradient_segment(x_row, dx_row, begin, end, label[row], scaling, grads, saved);
      }
    });
  });
}

Tensor token_logprobs_backward(
    Tensor grad_logp, OptionalTensor grad_lse, OptionalTensor grad_entropy, OptionalTensor grad_mean, Tensor logits,
    Tensor labels, Tensor logp, Tensor row_max, Tensor log_sum, Tensor entropy, int64_t ignore_index, double softcap,
    double temperature) {
  logits = with_unit_rows(logits);
  Tensor out = torch::stable::new_empty(logits, logits.sizes());
  advise_huge_pages(out);
  backward_into(
      out, grad_logp, grad_lse, grad_entropy, grad_mean, logits, labels, logp, row_max, log_sum, entropy, ignore_index,
      softcap, temperature);
  return out;
}

void token_logprobs_backward_(
    Tensor grad_logp, OptionalTensor grad_lse, OptionalTensor grad_entropy, OptionalTensor grad_mean, Tensor logits,
    Tensor labels, Tensor logp, Tensor row_max, Tensor log_sum, Tensor entropy, int64_t ignore_index, double softcap,
    double temperature) {
  check_unit_rows(logits);
  backward_into(
      logits, grad_logp, grad_lse, grad_entropy, grad_mean, logits, labels, logp, row_max, log_sum, entropy,
      ignore_index, softcap, temperature);
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&unlearn::token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&unlearn::token_logprobs_backward));
  m.impl("token_logprobs_backward_", TORCH_BOX(&unlearn::token_logprobs_backward_));
}
