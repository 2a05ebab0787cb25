// Element types and the run-time choice of instruction set, for the loops in this folder. No torch in here.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// One plain loop, compiled for AVX-512, AVX2 and the baseline; the dynamic linker picks the best one that the machine
// has. Other compilers and processors build the plain loop only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define UNLEARN_CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define UNLEARN_HAS_CLONES 1
#else
#define UNLEARN_CLONED
#define UNLEARN_HAS_CLONES 0
#endif

// A helper must be inlined into each clone to be compiled for the clone's instruction set.
#define UNLEARN_INLINE inline __attribute__((always_inline))
#define UNLEARN_INLINED __attribute__((always_inline))  // the same, behind a lambda's parameters

namespace unlearn {

enum class Simd { baseline, avx2, avx512 };

inline Simd simd_level() {
#if UNLEARN_HAS_CLONES
  static const Simd level = __builtin_cpu_supports("x86-64-v4")   ? Simd::avx512
                            : __builtin_cpu_supports("x86-64-v3") ? Simd::avx2
                                                                  : Simd::baseline;
  return level;
#else
  return Simd::baseline;
#endif
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
UNLEARN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The type that arithmetic on T is done in.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

UNLEARN_INLINE float load(float x) { return x; }
UNLEARN_INLINE double load(double x) { return x; }
UNLEARN_INLINE float load(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
UNLEARN_INLINE float load(float16 x) {
  // The 15 bits below the sign, moved into a float's place, are the value times 2^-112, subnormals included.
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t non_finite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(scaled | non_finite | (uint32_t(x.bits & 0x8000u) << 16));
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
UNLEARN_INLINE T store(compute_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const uint32_t u = bit_cast<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded)};
  } else if constexpr (std::is_same_v<T, float16>) {
    const uint32_t u = bit_cast<uint32_t>(x) & 0x7fffffffu;
    const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
    // Adding 1/2 puts a subnormal result's last bit at the float's last bit, so that the addition rounds it.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(u) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t half = u < 0x38800000u ? subnormal : normal;
    half = u >= 0x477ff000u ? 0x7c00u : half;
    half = u > 0x7f800000u ? 0x7e00u : half;
    return {uint16_t(half | sign)};
  } else {
    return x;
  }
}

template <class T>
UNLEARN_INLINE bool is_finite(T x) {
  return x - x == 0;
}

}  // namespace unlearn
