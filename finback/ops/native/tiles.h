// What grouped.c and causal.c share that is of no type: the size of a tile, and whether a processor is one for them.
#ifndef FINBACK_TILES_H
#define FINBACK_TILES_H

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

enum {
  TILE_ROWS = 6,
  TILE_VECTORS = LANES == 16 ? 4 : 2,  // with TILE_ROWS as many sums as there are registers for: 32 of AVX-512, else 16
  TILE_COLUMNS = TILE_VECTORS * LANES,  // of a panel
};

#ifdef _OPENMP
INLINE int64_t this_thread(void) { return omp_get_thread_num(); }
#else
INLINE int64_t this_thread(void) { return 0; }
#endif

// Whether these are the fastest there are here: in float32 with AVX-512, or AVX2 and its fused multiplication; in bfloat16 only with the
// dot product of AVX-512, and not where tiles of AMX multiply.
int64_t has_products(int64_t bfloat16) {
#if LANES == 16 && defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  return 1;
#elif LANES == 16 || (LANES == 8 && defined(__FMA__))
  return !bfloat16;
#else
  return 0;
#endif
}

#endif
