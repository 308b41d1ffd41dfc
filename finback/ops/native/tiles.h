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
  TILE_COLUMNS = 4 * LANES,  // of a panel
};

#ifdef _OPENMP
INLINE int64_t this_thread(void) { return omp_get_thread_num(); }
#else
INLINE int64_t this_thread(void) { return 0; }
#endif

// Whether these are the fastest there are here: not without AVX-512 and, in bfloat16, its dot product, nor where tiles of AMX multiply.
int64_t has_products(int64_t bfloat16) {
#if LANES == 16 && defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  return 1;
#elif LANES == 16
  return !bfloat16;
#else
  return 0;
#endif
}

#endif
