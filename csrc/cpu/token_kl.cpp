// Registers token_kl and its two backward forms for the CPU key. Segments of rows are spread over torch's threads.
#include "cpu/token_kl.h"

#include <tuple>

#include "cpu/row_tensors.h"

namespace unlearn {
namespace {

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: STD_TORCH_CHECK(false, "teacher_logits must be float32, float64, bfloat16 or float16");
  }
}

// The rows of a tensor by number.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        width_(tensor.element_size()),
        element_(element_of(tensor.scalar_type())),
        offset_(tensor) {}
  template <class C>
  KlRow<C> row(int64_t row, int64_t label, C penalty) const {
    return {data_ + offset_(row) * width_, element_, label, penalty};
  }

 private:
  const char* data_;
  int64_t width_;
  Element element_;
  RowOffsets offset_;
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs token_kl(
    Tensor logits, Tensor teacher_logits, Tensor labels, int64_t ignore_index, double softcap, double temperature,
    double label_penalty) {
  check_scaling(softcap, temperature);
  STD_TORCH_CHECK(same_shape(logits, teacher_logits), "teacher_logits must have the shape of logits");
  labels = contiguous_as(labels, ScalarType::Long);
  check_labels(logits, labels, ignore_index);
  logits = with_unit_rows(logits);
  teacher_logits = with_unit_rows(teacher_logits);
  const int64_t V = logits.size(logits.dim() - 1), N = labels.numel();
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  Tensor outputs[5];
  for (Tensor& output : outputs) output = torch::stable::new_empty(logits, labels.sizes(), dtype);
  const Rows rows(logits), teacher_rows(teacher_logits);
  const int64_t* label = data<int64_t>(labels);
  const auto compute = [&](auto type) {
    using C = decltype(type);
    const Scaling<C> scaling(softcap, temperature);
    C* out[5];
    for (int i = 0; i < 5; ++i) out[i] = mutable_data<C>(outputs[i]);
    const auto add = [&](int64_t row, int64_t begin, int64_t end, KlSums<C>& sums) {
      if (label[row] == ignore_index) return;
      const KlRow<C> own = rows.row(row, -1, C(0)), teacher = teacher_rows.row(row, label[row], C(label_penalty));
      add_kl_segment(own, teacher, begin, end, scaling, sums);
    };
    const auto finish = [&](int64_t row, const KlSums<C>& sums) {
      KlResult<C> result{};
      if (label[row] != ignore_index) result = kl_result(sums);
      const C values[5] = {result.kl, result.max, result.log_sum, result.teacher_max, result.teacher_log_sum};
      for (int i = 0; i < 5; ++i) out[i][row] = values[i];
    };
    reduce_rows<KlSums<C>>(N, V, add, finish);
  };
  if (dtype == ScalarType::Double) {
    compute(double{});
  } else {
    element_of(logits.scalar_type());  // or an error
    compute(float{});
  }
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
}

void backward_into(
    Tensor out, Tensor grad, const Tensor& logits, Tensor teacher_logits, Tensor labels, const Tensor& row_max,
    const Tensor& log_sum, const Tensor& teacher_max, const Tensor& teacher_log_sum, int64_t ignore_index,
    double softcap, double temperature, double label_penalty) {
  check_scaling(softcap, temperature);
  STD_TORCH_CHECK(same_shape(logits, teacher_logits), "teacher_logits must have the shape of logits");
  labels = contiguous_as(labels, ScalarType::Long);
  check_labels(logits, labels, ignore_index);
  teacher_logits = with_unit_rows(teacher_logits);
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const int64_t V = logits.size(logits.dim() - 1), N = labels.numel();
  Tensor saved[5];
  const Tensor* given[5] = {&grad, &row_max, &log_sum, &teacher_max, &teacher_log_sum};
  for (int i = 0; i < 5; ++i) {
    STD_TORCH_CHECK(given[i]->numel() == N, "grad and the saved maxima and sums must have the shape of labels");
    saved[i] = contiguous_as(*given[i], dtype);
  }
  const RowOffsets offset(logits), out_offset(out);
  const Rows teacher_rows(teacher_logits);
  const int64_t* label = data<int64_t>(labels);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const Scaling<C> scaling(softcap, temperature);
    const T* x = data<T>(logits);
    T* dx = mutable_data<T>(out);
    const C* s[5];
    for (int i = 0; i < 5; ++i) s[i] = data<C>(saved[i]);
    for_segments(N, V, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
      T* dx_row = dx + out_offset(row);
      if (label[row] == ignore_index) {
        std::fill(dx_row + begin, dx_row + end, T{});
      } else {
        const KlRow<C> teacher = teacher_rows.row(row, label[row], C(label_penalty));
        const KlResult<C> result{0, s[1][row], s[2][row], s[3][row], s[4][row]};
        kl_gradient_segment(x + offset(row), teacher, dx_row, begin, end, scaling, s[0][row], result);
      }
    });
  });
}

Tensor token_kl_backward(
    Tensor grad, Tensor logits, Tensor teacher_logits, Tensor labels, Tensor row_max, Tensor log_sum,
    Tensor teacher_max, Tensor teacher_log_sum, int64_t ignore_index, double softcap, double temperature,
    double label_penalty) {
  logits = with_unit_rows(logits);
  Tensor out = torch::stable::new_empty(logits, logits.sizes());
  advise_huge_pages(out);
  backward_into(
      out, grad, logits, teacher_logits, labels, row_max, log_sum, teacher_max, teacher_log_sum, ignore_index, softcap,
      temperature, label_penalty);
  return out;
}

void token_kl_backward_(
    Tensor grad, Tensor logits, Tensor teacher_logits, Tensor labels, Tensor row_max, Tensor log_sum,
    Tensor teacher_max, Tensor teacher_log_sum, int64_t ignore_index, double softcap, double temperature,
    double label_penalty) {
  check_unit_rows(logits);
  backward_into(
      logits, grad, logits, teacher_logits, labels, row_max, log_sum, teacher_max, teacher_log_sum, ignore_index,
      softcap, temperature, label_penalty);
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("token_kl", TORCH_BOX(&unlearn::token_kl));
  m.impl("token_kl_backward", TORCH_BOX(&unlearn::token_kl_backward));
  m.impl("token_kl_backward_", TORCH_BOX(&unlearn::token_kl_backward_));
}
