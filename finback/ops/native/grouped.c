// The products of a layer of experts on a CPU with AVX-512: each group of rows times its own matrix, all groups in one call.
//
// One matrix times thousands of rows is oneDNN's, which reaches the ceiling. Here there are few rows for each of many matrices, and
// other numbers of them at every step: work is shared out among threads by groups and panels, not inside of each product, nothing is
// compiled for a number of rows, and no row has to be filled in.
//
// Compiled for the machine it runs on, on first use, by build.py; grouped.py declares these functions to Python. Everything typed is
// written once, in grouped.h, and included for float32 (names end in _float32) and for bfloat16 (_bfloat16).
//
// Operands are seen in words of 32 bits: one float, or two bfloat16 that are neighbours along the dimension that is summed over, as the
// processor's dot product takes them. A tile of the result, 6 rows by 64 columns, stays in 24 registers while that dimension is walked
// along once: 4 loads of the right operand, packed into a panel that lies in a cache, and 6 words of the left one for 24 multiplications.
// Nothing depends on the number of threads: every element of a result is one thread's sum in one order.

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

enum {
  TILE_ROWS = 6,
  TILE_COLUMNS = 4 * LANES,  // of a panel
  ROWS_AT_ONCE = 160 * TILE_ROWS,  // of one task: with a panel they stay in a cache of the core's own
  DEPTH_AT_ONCE = 512,  // words of a sum over rows between two visits to memory
  STRIP = 16 * TILE_ROWS,  // columns that are packed together to be rows of tiles: whole vectors of whole tiles
};

#ifdef _OPENMP
INLINE int64_t this_thread(void) { return omp_get_thread_num(); }
#else
INLINE int64_t this_thread(void) { return 0; }
#endif

#define BF16 0
#define NAME(name) name##_float32
#define STORED float
#define PER_WORD 1
#include "grouped.h"
#undef BF16
#undef NAME
#undef STORED
#undef PER_WORD

#define BF16 1
#define NAME(name) name##_bfloat16
#define STORED uint16_t
#define PER_WORD 2
#include "grouped.h"

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
