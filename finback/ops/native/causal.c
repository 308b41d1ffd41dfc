// Causal attention and its gradients on a CPU with AVX-512 or AVX2: every head on its own, and no score leaves the cache of a core.
//
// As two large products with a softmax between them, scores would be written to memory and read again, and half of them lie above the
// diagonal. Here six queries at a time meet the keys up to their own, become weights while they lie in the first level, and meet the
// values. The gradients make the weights again (as Dao 2023, FlashAttention-2), from rows that are whole: there is room for them.
//
// Compiled for the machine it runs on, on first use, by build.py; causal.py declares these functions to Python. Everything typed is
// written once, in causal.h, and included for float32 (names end in _float32) and for bfloat16 (_bfloat16). Scores, their softmax and
// all sums are float32; weights and the gradients of scores are rounded where they are multiplied.
// Nothing depends on the number of threads: every element of a result is one thread's sum in one order.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "tiles.h"

enum { QUERIES_AT_ONCE = 16 * TILE_ROWS };  // whose weights are kept until keys and values have had their gradients from them

// A tensor of [batch, heads, tokens, values]: how far its rows lie apart, in elements.
typedef struct {
  int64_t batch, head, token;
} strides;

// Of one sequence of the batch: its queries see the keys of `past` tokens that came before them, then their own.
typedef struct {
  int64_t past, tokens;
} span;

// The first `count` lanes, or all if they are fewer; the others become `rest`.
INLINE vector first_lanes(vector value, int64_t count, float rest) {
  integers lanes;
  UNROLL(16) for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  return count >= LANES ? value : where(lanes < (int32_t)count, value, splat(rest));
}

#define BF16 0
#define NAME(name) name##_float32
#define STORED float
#define PER_WORD 1
#include "tile.h"
#include "causal.h"
#undef BF16
#undef NAME
#undef STORED
#undef PER_WORD

#define BF16 1
#define NAME(name) name##_bfloat16
#define STORED uint16_t
#define PER_WORD 2
#include "tile.h"
#include "causal.h"
