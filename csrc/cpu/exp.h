// exp(x), for x up to about 1 or NaN, as straight-line arithmetic: a plain loop over it vectorises everywhere.
//
// x = n ln 2 + r with |r| <= ln(2)/2; exp(r) by its Taylor polynomial (truncation below 1e-8 relative in float, 1e-17 in
// double), times 2^n in two factors, because 2^n alone overflows or underflows before the result does.
#pragma once

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

template <class T>
UNLEARN_INLINE T exponential(T x) {
  using C = ExpConstants<T>;
  x = x < C::lowest ? C::lowest : x;  // written so that NaN passes
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
  y = y * r + T(1);
  const T half = (n * T(0.5) + C::integer_shift) - C::integer_shift;
  return y * power_of_two(half) * power_of_two(n - half);
}

}  // namespace unlearn
