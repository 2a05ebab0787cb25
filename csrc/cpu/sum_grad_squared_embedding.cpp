// Registers sum_grad_squared_embedding_ for the CPU key. Rows of the table and ranges of columns are spread over threads.
#include "cpu/sum_grad_squared_embedding.h"

#include "cpu/moment_tensors.h"

namespace unlearn {
namespace {

void check_tokens(const int64_t* tokens, int64_t N, int64_t T, int64_t V) {
  for (int64_t n = 0; n < N; ++n) {
    STD_TORCH_CHECK(
        tokens[n] < V, "tokens holds ", tokens[n], " at [", n / T, ", ", n % T, "]: a token must be below V = ", V,
        "; negative ones are skipped");
  }
}

// How many of the ordered tokens are the most frequent one: what no split by rows can share out.
int64_t longest_row(const int64_t* tokens, const std::vector<int64_t>& places) {
  int64_t longest = 0, start = 0;
  for (int64_t i = 0; i < int64_t(places.size()); ++i) {
    if (tokens[places[i]] != tokens[places[start]]) start = i;
    longest = std::max(longest, i + 1 - start);
  }
  return longest;
}

template <class T>
void run(EmbeddingProblem<T> q, int64_t N, const Tensor& out, const std::optional<Tensor>& first, bool absolute) {
  const int64_t V = out.size(0), H = out.size(1), threads = torch::stable::get_num_threads();
  const Order order = order_by_token(q.tokens, N, q.T_, V, q.g);
  q.places = order.places.data();
  q.offsets = order.offsets.data();
  q.count = int64_t(order.places.size());
  int64_t width = std::min(H, COLUMNS);
  if (threads > 1 && longest_row(q.tokens, order.places) * threads > q.count) {
    while (width > 64 && (H + width - 1) / width < threads) width = (width / 2 + 15) / 16 * 16;
  }
  const auto moments = moments_at<compute_t<T>>(out, first, absolute);
  const int64_t blocks = (H + width - 1) / width, first_row = first ? first->stride(0) : 0;
  torch::stable::parallel_for(
      0, blocks * q.count, std::max<int64_t>(1, GRAIN / width), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin / q.count; block * q.count < end; ++block) {
          const int64_t from = std::max<int64_t>(0, begin - block * q.count);
          const int64_t to = std::min(q.count, end - block * q.count);
          const int64_t c0 = block * width, columns = std::min(width, H - c0);
          if (q.g.stride_c == 1) {
            embedding_rows<true>(q, from, to, c0, columns, moments, out.stride(0), first_row);
          } else {
            embedding_rows<false>(q, from, to, c0, columns, moments, out.stride(0), first_row);
          }
        }
      });
}

void sum_grad_squared_embedding_(
    Tensor out, Tensor tokens, Tensor grad_outputs, std::optional<Tensor> weights, std::optional<Tensor> first,
    double scale, bool absolute) {
  STD_TORCH_CHECK(
      grad_outputs.dim() == 3 && tokens.dim() == 2 && tokens.size(0) == grad_outputs.size(0) &&
          tokens.size(1) == grad_outputs.size(1),
      "tokens must be [B, T] and grad_outputs [B, T, H]");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(1) == grad_outputs.size(2), "out must be [V, H]");
  check_moments(out, grad_outputs, weights, first);
  tokens = contiguous_as(tokens, ScalarType::Long);
  const int64_t N = tokens.numel();
  check_tokens(data<int64_t>(tokens), N, tokens.size(1), out.size(0));
  if (out.numel() == 0 || N == 0) return;
  if (weights) weights = torch::stable::contiguous(*weights);
  dispatch_floating(grad_outputs.scalar_type(), "grad_outputs", [&](auto type) {
    using T = decltype(type);
    EmbeddingProblem<T> problem{
        strided<T>(grad_outputs),
        data<int64_t>(tokens),
        tokens.size(1),
        weights ? data<compute_t<T>>(*weights) : nullptr,
        scale,
        nullptr,
        nullptr,
        0};
    run(problem, N, out, first, absolute);
  });
}

}  // namespace
}  // namespace unlearn

STABLE_TORCH_LIBRARY_IMPL(unlearn_fast, CPU, m) {
  m.impl("sum_grad_squared_embedding_", TORCH_BOX(&unlearn::sum_grad_squared_embedding_));
}
