// The products of a layer of experts on a CPU with AVX-512 or AVX2: each group of rows times its own matrix, all groups in one call.
//
// One matrix times thousands of rows is oneDNN's, which reaches the ceiling. Here there are few rows for each of many matrices, and
// other numbers of them at every step: work is shared out among threads by groups and panels, not inside of each product, nothing is
// compiled for a number of rows, and no row has to be filled in.
//
// Compiled for the machine it runs on, on first use, by build.py; grouped.py declares these functions to Python. Everything typed is
// written once, in grouped.h, and included for float32 (names end in _float32) and for bfloat16 (_bfloat16).
//
// Nothing depends on the number of threads: every element of a result is one thread's sum in one order.

#include <stdint.h>
#include <string.h>
#include "tiles.h"

enum {
  ROWS_AT_ONCE = 160 * TILE_ROWS,  // of one task: with a panel they stay in a cache of the core's own
  DEPTH_AT_ONCE = 256,  // words of a sum over rows between two visits to it
  STRIP = (LANES == 16 ? 8 : 4) * TILE_ROWS,  // columns that are packed together to be rows of tiles: whole vectors of whole tiles
  STRIPS_AT_ONCE = 480 / STRIP,         // and
  PANELS_AT_ONCE = 256 / TILE_COLUMNS,  // of one task: with what is summed up they stay in a cache of the core's own
};

#define BF16 0
#define NAME(name) name##_float32
#define STORED float
#define PER_WORD 1
#include "tile.h"
#include "grouped.h"
#undef BF16
#undef NAME
#undef STORED
#undef PER_WORD

#define BF16 1
#define NAME(name) name##_bfloat16
#define STORED uint16_t
#define PER_WORD 2
#include "tile.h"
#include "grouped.h"
