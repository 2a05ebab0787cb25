// pybind11: build information, CPU features, advice on memory, and over numpy buffers (no torch tensor is made) the
// dampening loop, and exp as the row kernels compute it, whose accuracy the tests check.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cpu/dampen.h"
#include "cpu/exp.h"
#include "cpu/pages.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = BUILD_COMPILER;
  info["cuda_architectures"] = BUILD_CUDA_ARCHITECTURES;
  info["cuda_version"] = BUILD_CUDA_VERSION;
  info["cuda_missing"] = BUILD_CUDA_MISSING;
  return info;
}

const char* simd() {
  switch (unlearn::simd_level()) {
    case unlearn::Simd::avx512: return "avx512";
    case unlearn::Simd::avx2: return "avx2";
    default: return "baseline";
  }
}

unlearn::Strided strided(const py::buffer_info& info) {
  unlearn::Strided t{info.ptr, unlearn::Float::float32, {}};
  if (info.itemsize == 2)
    t.dtype = unlearn::Float::float16;
  else if (info.itemsize == 8)
    t.dtype = unlearn::Float::float64;
  else if (info.itemsize != 4)
    throw py::value_error("p, f and r must be float16, float32 or float64");
  for (py::ssize_t d = 0; d < info.ndim; ++d) t.strides.push_back(info.strides[d] / info.itemsize);
  return t;
}

// The Python side has checked dtypes and layout.
py::tuple dampen_buffers(
    const py::buffer& p, const py::buffer& f, const py::buffer& r, double alpha, double lam, double exponent,
    double cap, double floor) {
  const py::buffer_info pi = p.request(true), fi = f.request(), ri = r.request();
  if (pi.shape != fi.shape || pi.shape != ri.shape) throw py::value_error("p, f and r must have one shape");
  unlearn::DampenTensor t{
      unlearn::Axes(pi.shape.begin(), pi.shape.end()), strided(pi), strided(fi), strided(ri), pi.size, alpha, lam};
  unlearn::merge_axes(t.shape, {&t.p, &t.f, &t.r});
  unlearn::DampenStats stats;
  {
    py::gil_scoped_release release;
    stats = unlearn::dampen({t}, {exponent, cap, floor})[0];
  }
  return py::make_tuple(stats.selected, stats.non_finite, stats.non_finite_selected, stats.factor_sum);
}

template <class T>
UNLEARN_CLONED void exponentials(T* x, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] = unlearn::exponential<T>(x[j]);
}

void exponentials_of_buffer(const py::buffer& x) {
  const py::buffer_info info = x.request(true);
  if (info.ndim != 1 || info.strides[0] != info.itemsize) throw py::value_error("x must be contiguous, with one axis");
  if (info.format == py::format_descriptor<float>::format())
    return exponentials(static_cast<float*>(info.ptr), info.size);
  if (info.format == py::format_descriptor<double>::format())
    return exponentials(static_cast<double*>(info.ptr), info.size);
  throw py::value_error("x must be float32 or float64");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information, CPU features and the numpy door of unlearn_fast.";
  m.def("build_info", &build_info, "Compiler and CUDA architectures of this build.");
  m.def("simd", &simd, "The instruction set that the CPU kernels run on here: avx512, avx2 or baseline.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, int64_t bytes) {
        unlearn::advise_huge_pages(reinterpret_cast<const void*>(address), bytes);
      },
      "Asks for huge pages under memory that nobody has touched.");
  m.def("dampen", &dampen_buffers, "Dampens one numpy array in place; returns its four counts.");
  m.def("exponentials", &exponentials_of_buffer, "exp of a contiguous numpy array, for x up to 1, in place.");
}
