// A tensor's importance to the forget set and to the reference set.
#pragma once

#include "cpu/strided.h"

namespace unlearn {

struct Importances {
  Axes shape;
  Strided f, r;
  int64_t n;

  // Compared in double where one of them is.
  bool wide() const { return f.dtype == Float::float64 || r.dtype == Float::float64; }
};

}  // namespace unlearn
