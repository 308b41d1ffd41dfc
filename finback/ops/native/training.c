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
#ifdef __AVX512BF16__
#include <immintrin.h>
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

// Where the largest value lies that is not taken, the first of equals; some index, if all are nan.
INLINE int64_t largest(const float *values, const unsigned char *taken, int64_t count) {
  int64_t found = -1;
  for (int64_t i = 0; i < count; i++)
    if (!taken[i] && (found < 0 || values[i] > values[found])) found = i;
  return found;
}

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

// ---- router

// The `choices` largest of each row of scores [rows, experts], the first of equals; where kept < groups, only from the `kept` best
// groups, ranked by the sum of their two largest scores (`two_per_group`) or by their largest. Indices [rows, choices].
void select_experts(const float *scores, int64_t *indices, int64_t rows, int64_t experts, int64_t choices, int64_t groups,
                    int64_t kept, int64_t two_per_group, int64_t threads) {
  int64_t per_group = experts / groups;
  ROWS_IN_PARALLEL(threads)
  for (int64_t row = 0; row < rows; row++) {
    const float *score = scores + row * experts;
    float of_group[groups];
    unsigned char taken[experts], taken_group[groups];
    memset(taken, kept < groups, sizeof taken);
    if (kept < groups) {
      memset(taken_group, 0, sizeof taken_group);
      for (int64_t g = 0; g < groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * per_group; e < (g + 1) * per_group; e++) {
          second = score[e] > first ? first : score[e] > second ? score[e] : second;
          first = score[e] > first ? score[e] : first;
        }
        of_group[g] = two_per_group ? first + second : first;
      }
      for (int64_t k = 0; k < kept; k++) {
        int64_t g = largest(of_group, taken_group, groups);
        taken_group[g] = 1;
        memset(taken + g * per_group, 0, per_group);
      }
    }
    for (int64_t k = 0; k < choices; k++) {
      int64_t e = largest(score, taken, experts);
      taken[e] = 1;
      indices[row * choices + k] = e;
    }
  }
}
