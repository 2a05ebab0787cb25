// exp(x), for x up to about 1 or NaN, and tanh(x), as straight-line arithmetic: a plain loop over them vectorises
// everywhere.
//
// x = n ln 2 + r with |r| <= ln(2)/2; exp(r) by a polynomial: in float within 5e-9 relative, fitted to the interval with
// its first two coefficients held; in double Taylor's, within 1e-17. Then times 2^n: n + lift is added to the exponent,
// where it stays among the normal numbers however small the result, and a multiplication takes 2^lift away, which rounds
// what is subnormal once.
#pragma once

#include <cmath>

#include "cpu/scalar.h"

namespace unlearn {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float lift = 64;
  static constexpr float unlift = 0x1p-64f;
  static constexpr float shift = 0x1.8p23f + lift;  // n + this rounds n; the sum's low bits hold n + lift
  static constexpr float lowest = -104.0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double lift = 512;
  static constexpr double unlift = 0x1p-512;
  static constexpr double shift = 0x1.8p52 + lift;
  static constexpr double lowest = -746.0;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
};

// x = n ln 2 + r, and exp(r) = 1 + r * series; the low bits of `shifted` are n + lift.
template <class T>
struct Reduced {
  T shifted, r, series;
};

template <class T>
UNLEARN_INLINE Reduced<T> reduced(T x) {
  using C = ExpConstants<T>;
  const T shifted = x * T(1.4426950408889634074) + C::shift, n = shifted - C::shift;
  const T r = (x - n * C::ln2_high) - n * C::ln2_low;
  T y;
  if constexpr (std::is_same_v<T, float>) {
    y = T(0x1.6b6e18p-10);
    y = y * r + T(0x1.122fc2p-7);
    y = y * r + T(0x1.555688p-5);
    y = y * r + T(0x1.5554a4p-3);
  } else {
    y = T(1.0 / 6227020800);
    y = y * r + T(1.0 / 479001600);
    y = y * r + T(1.0 / 39916800);
    y = y * r + T(1.0 / 3628800);
    y = y * r + T(1.0 / 362880);
    y = y * r + T(1.0 / 40320);
    y = y * r + T(1.0 / 5040);
    y = y * r + T(1.0 / 720);
    y = y * r + T(1.0 / 120);
    y = y * r + T(1.0 / 24);
    y = y * r + T(1.0 / 6);
  }
  y = y * r + T(0.5);
  y = y * r + T(1);
  return {shifted, r, y};
}

// y * 2^n, for y in [1/2, 2]. Not NaN for every NaN.
template <class T>
UNLEARN_INLINE T times_power_of_two(T y, T shifted) {
  using C = ExpConstants<T>;
  using Bits = typename C::Bits;
  return bit_cast<T>(bit_cast<Bits>(y) + (bit_cast<Bits>(shifted) << C::mantissa)) * C::unlift;
}

template <class T>
UNLEARN_INLINE T exponential(T x) {
  x = x < ExpConstants<T>::lowest ? ExpConstants<T>::lowest : x;  // written so that NaN passes
  const Reduced<T> e = reduced(x);
  return times_power_of_two(e.series * e.r + T(1), e.shifted) + e.r * T(0);  // NaN for NaN
}

template <class T>
struct Tanh {
  T value, slope;  // tanh(x) and 1 - tanh(x)^2, both to a few ulp of themselves
};

// For |x| up to -lowest / 2, beyond which both no longer change, or NaN. The caller clamps, in a loop of its own: in one
// loop the compiler makes a branch of what becomes constant.
// With e = exp(-2|x|): tanh |x| = (1 - e) / (1 + e), and 1 - tanh^2 = 4 e / (1 + e)^2; e - 1 keeps its digits as x -> 0.
template <class T>
UNLEARN_INLINE Tanh<T> hyperbolic_tangent(T x) {
  const Reduced<T> reduced_x = reduced(T(-2) * std::fabs(x));
  const T power = times_power_of_two(T(1), reduced_x.shifted), series = reduced_x.series * reduced_x.r;
  const T e = times_power_of_two(series + T(1), reduced_x.shifted), e_minus_one = power * series + (power - T(1));
  const T reciprocal = T(1) / (e_minus_one + T(2));
  return {std::copysign(e_minus_one * reciprocal, x), T(4) * e * reciprocal * reciprocal};
}

}  // namespace unlearn
