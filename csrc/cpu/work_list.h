// One work list over many tensors: fixed runs of elements, small tensors' together in one piece of work, taken by
// whichever thread is free. What is summed up goes to a place of its own for each run, so that results depend neither on
// the number of threads nor on which took what.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace unlearn {

constexpr int64_t RUN = 65536;  // elements of one tensor that are taken together, at most

struct Run {
  int64_t tensor, start, count;
};

class WorkList {
 public:
  // The runs of one more tensor of n elements.
  void add(int64_t n) {
    for (int64_t start = 0; start < n; start += RUN) {
      const int64_t count = n - start < RUN ? n - start : RUN;
      if (runs_.empty() || filled_ + count > RUN) {
        pieces_.push_back(int64_t(runs_.size()));
        filled_ = 0;
      }
      filled_ += count;
      runs_.push_back({tensors_, start, count});
    }
    ++tensors_;
  }

  const std::vector<Run>& runs() const { return runs_; }

  // work(state, run, index of the run) for every run; each thread has a state of its own, which `done` is given, one
  // thread at a time, when nothing is left.
  template <class State, class Work, class Done>
  void for_each(const Work& work, const Done& done) const {
    const int64_t pieces = int64_t(pieces_.size());
    std::atomic<int64_t> next{0};
    std::mutex one_at_a_time;
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t, int64_t) {
      State state{};
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        const int64_t end = piece + 1 < pieces ? pieces_[piece + 1] : int64_t(runs_.size());
        for (int64_t run = pieces_[piece]; run < end; ++run) work(state, runs_[run], run);
      }
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      done(state);
    });
  }

  template <class Work>
  void for_each(const Work& work) const {
    struct Nothing {};
    for_each<Nothing>([&](Nothing&, const Run& run, int64_t index) { work(run, index); }, [](Nothing&) {});
  }

 private:
  std::vector<Run> runs_;
  std::vector<int64_t> pieces_;  // first run of each
  int64_t tensors_ = 0, filled_ = 0;
};

}  // namespace unlearn
