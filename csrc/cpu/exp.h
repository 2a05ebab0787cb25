// exp(x), for x up to about 1 or NaN, and tanh(x), as straight-line arithmetic: a plain loop over them vectorises
// everywhere.
//
// x = n ln 2 + r with |r| <= ln(2)/2; exp(r) by its Taylor polynomial (truncation below 1e-8 relative in float, 1e-17 in
// double), times 2^n in two factors, because 2^n alone overflows or underflows before the result does.
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
  static constexpr float integer_shift = 0x1.8p23f;  // x + this - this rounds x; its low bits then hold the integer
  static constexpr float lowest = -104.0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double integer_shift = 0x1.8p52;
  static constexpr double lowest = -746.0;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
};

template <class T>
UNLEARN_INLINE T power_of_two(T n) {
  using C = ExpConstants<T>;
  const auto shifted = bit_cast<typename C::Bits>(n + C::integer_shift) << C::mantissa;
  return bit_cast<T>(shifted + bit_cast<typename C::Bits>(T(1)));
}

// x = n ln 2 + r, and exp(r) = 1 + r * series.
template <class T>
struct Reduced {
  T n, r, series;
};

template <class T>
UNLEARN_INLINE Reduced<T> reduced(T x) {
  using C = ExpConstants<T>;
  const T n = (x * T(1.4426950408889634074) + C::integer_shift) - C::integer_shift;
  const T r = (x - n * C::ln2_high) - n * C::ln2_low;
  T y;
  if constexpr (std::is_same_v<T, float>) {
    y = T(1.0 / 5040);
  } else {
    y = T(1.0 / 6227020800);
    y = y * r + T(1.0 / 479001600);
    y = y * r + T(1.0 / 39916800);
    y = y * r + T(1.0 / 3628800);
    y = y * r + T(1.0 / 362880);
    y = y * r + T(1.0 / 40320);
    y = y * r + T(1.0 / 5040);
  }
  y = y * r + T(1.0 / 720);
  y = y * r + T(1.0 / 120);
  y = y * r + T(1.0 / 24);
  y = y * r + T(1.0 / 6);
  y = y * r + T(0.5);
  y = y * r + T(1);
  return {n, r, y};
}

// 2^n in two factors.
template <class T>
struct PowerOfTwo {
  T first, second;
};

template <class T>
UNLEARN_INLINE PowerOfTwo<T> power_in_two_factors(T n) {
  using C = ExpConstants<T>;
  const T half = (n * T(0.5) + C::integer_shift) - C::integer_shift;
  return {power_of_two(half), power_of_two(n - half)};
}

template <class T>
UNLEARN_INLINE T exponential(T x) {
  x = x < ExpConstants<T>::lowest ? ExpConstants<T>::lowest : x;  // written so that NaN passes
  const Reduced<T> e = reduced(x);
  const PowerOfTwo<T> power = power_in_two_factors(e.n);
  return (e.series * e.r + T(1)) * power.first * power.second;
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
  const PowerOfTwo<T> factors = power_in_two_factors(reduced_x.n);
  const T power = factors.first * factors.second, series = reduced_x.series * reduced_x.r;
  const T e = (series + T(1)) * factors.first * factors.second, e_minus_one = power * series + (power - T(1));
  const T reciprocal = T(1) / (e_minus_one + T(2));
  return {std::copysign(e_minus_one * reciprocal, x), T(4) * e * reciprocal * reciprocal};
}

}  // namespace unlearn
