// What a dampening would change, and putting it back: for each run of 65,536 elements the 16-bit offsets of the selected
// ones and their values, so that a changed float32 costs 6 bytes.
//
// Reads f and r, and p where something is selected. Work: the runs of dampening (work_list.h); each fills memory of its
// own, which is put together in order once all sizes are known.
#pragma once

#include "cpu/dampen.h"

namespace unlearn {

struct UndoRun {
  std::vector<uint16_t> offsets;
  std::vector<char> values;
};

// Appends base + i for every selected i; returns how many there are.
template <class C>
UNLEARN_CLONED int64_t selected_offsets(const C* f, const C* r, int64_t n, C alpha, int64_t base, uint16_t* offsets) {
  int64_t found = 0;
  for (int64_t start = 0; start < n; start += DAMPEN_BLOCK) {
    const int64_t end = n - start < DAMPEN_BLOCK ? n : start + DAMPEN_BLOCK;
    int32_t selected = 0;
#pragma omp simd reduction(+ : selected)
    for (int64_t i = start; i < end; ++i) selected += f[i] > r[i] * alpha;
    if (selected == 0) continue;
    for (int64_t i = start; i < end; ++i) {  // without a branch; the last write of a block may be of no use
      offsets[found] = uint16_t(base + i);
      found += f[i] > r[i] * alpha;
    }
  }
  return found;
}

template <class C>
void record_offsets(const DampenTensor& t, const Run& run, std::vector<uint16_t>& offsets) {
  static thread_local std::vector<uint16_t> buffer(RUN + 1);
  const bool direct = t.f.dense() && t.r.dense() && t.f.dtype == float_of<C> && t.r.dtype == float_of<C>;
  const int64_t step = direct ? run.count : DAMPEN_SLAB;
  C f[DAMPEN_SLAB], r[DAMPEN_SLAB];
  int64_t found = 0;
  for (int64_t done = 0; done < run.count; done += step) {
    const int64_t count = std::min(step, run.count - done), start = run.start + done;
    const C *fs = read(t.f, t.shape, start, count, f), *rs = read(t.r, t.shape, start, count, r);
    found += selected_offsets(fs, rs, count, C(t.alpha), done, buffer.data() + found);
  }
  offsets.assign(buffer.begin(), buffer.begin() + found);
}

// visit(value, index among the offsets) with a pointer to each of the run's elements at `offsets`.
template <class P, class Visit>
void for_each_offset(
    const Strided& p, const Axes& shape, const Run& run, const uint16_t* offsets, int64_t n, const Visit& visit) {
  P* data = static_cast<P*>(p.data);
  int64_t i = 0, passed = 0;
  const auto piece = [&](int64_t offset, int64_t stride, int64_t count) {
    for (; i < n && offsets[i] < passed + count; ++i) visit(data + offset + (offsets[i] - passed) * stride, i);
    passed += count;
  };
  if (p.dense())
    piece(run.start, 1, run.count);
  else
    for_each_piece(shape, p.strides, run.start, run.count, piece);
}

inline UndoRun record_run(const DampenTensor& t, const Run& run) {
  UndoRun log;
  if (t.wide())
    record_offsets<double>(t, run, log.offsets);
  else
    record_offsets<float>(t, run, log.offsets);
  const int64_t n = int64_t(log.offsets.size());
  log.values.resize(n * width(t.p.dtype));
  dispatch(t.p.dtype, [&](auto type) {
    using P = decltype(type);
    for_each_offset<P>(t.p, t.shape, run, log.offsets.data(), n, [&](const P* value, int64_t i) {
      std::memcpy(log.values.data() + i * sizeof(P), value, sizeof(P));
    });
  });
  return log;
}

inline void undo_run(
    const Strided& p, const Axes& shape, const Run& run, const uint16_t* offsets, int64_t n, const char* values) {
  dispatch(p.dtype, [&](auto type) {
    using P = decltype(type);
    for_each_offset<P>(
        p, shape, run, offsets, n, [&](P* value, int64_t i) { std::memcpy(value, values + i * sizeof(P), sizeof(P)); });
  });
}

}  // namespace unlearn
