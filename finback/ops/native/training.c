// The elementwise kernels of a training step on a CPU: many rows, each read and written once. Products stay with torch.
//
// Compiled for the machine it runs on, on first use, by build.py; training.py declares these functions to Python. Everything
// typed is written once, in training.h, and included for float32 (names end in _float32) and for bfloat16 (_bfloat16).
// Everything is computed in float32 and rounded once, at the end.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

// Sums over rows are made of this many parts, whatever the number of threads, so that results do not depend on it.
enum { PARTS = 64 };
// Elements of a flat array that a thread takes at a time.
enum { BLOCK = 1 << 14 };

#ifdef _OPENMP
#define ROWS_IN_PARALLEL(threads) PRAGMA(omp parallel for num_threads((int)(threads)) schedule(static))
INLINE int64_t this_thread(void) { return omp_get_thread_num(); }
#else
#define ROWS_IN_PARALLEL(threads)
INLINE int64_t this_thread(void) { return 0; }
#endif

INLINE vector square_root(vector x) {
  vector result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = sqrtf(x[lane]);
  return result;
}

// A pass over `size` elements in vectors; the last one may be shorter, and is read and written in part.
#define EACH_VECTOR(i, size) for (int64_t i = 0; i < (size); i += LANES)

#define NAME(name) name##_float32
#define STORED float
#define LOAD load_float32
#define STORE store_float32
#include "training.h"
#undef NAME
#undef STORED
#undef LOAD
#undef STORE

#define NAME(name) name##_bfloat16
#define STORED uint16_t
#define LOAD load_bfloat16
#define STORE store_bfloat16
#include "training.h"
