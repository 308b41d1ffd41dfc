// Matrix products with few rows of activations, for one stored type: included twice, with BF16 0 and 1.
//
// y = W x for W [rows, inputs] as it lies in memory (nothing is ever repacked) and up to a few dozen tokens x. Every weight
// is read once from memory; while a block of rows is multiplied, the next one is prefetched, so the time is the larger of
// reading and multiplying and not their sum. Sums are float32.
//
//   dots    few tokens: 4 rows of W against up to 4 tokens, vectors along the inputs, lanes summed at the end.
//   panel   panels of 16 tokens: one token per lane, so no sums over lanes; each weight is broadcast against 2 panels.
//   mix     the transposed product, x W: rows of W added up with a coefficient each.
//
// Activations are packed first. In float32 they stay as they are; in bfloat16, where the processor multiplies pairs
// (AVX512-BF16), they are rounded to bfloat16, as torch's product does; elsewhere they are float32 and weights are widened.

#if BF16
typedef uint16_t NAME(stored);
#define LOAD load_bfloat16
#define LOAD_PART load_part_bfloat16
#define STORE store_bfloat16
#define STORE_PART store_part_bfloat16
#define TO_FLOAT(value) float_of_bfloat16(value)
#else
typedef float NAME(stored);
#define LOAD load_float32
#define LOAD_PART load_part_float32
#define STORE store_float32
#define STORE_PART store_part_float32
#define TO_FLOAT(value) (value)
#endif

// One step multiplies LANES times PAIR inputs: PAIR neighbours meet in each 32-bit lane.
#if BF16 && defined(__AVX512BF16__)
#define PAIR 2
#define IN_PLACE 1  // stored values are packed values
typedef uint16_t NAME(packed);
typedef __m512i NAME(operand);
#define LOAD_WEIGHT(from) _mm512_loadu_si512(from)
#define LOAD_PACKED(from) _mm512_loadu_si512(from)
#define STORE_PACKED store_bfloat16
#define STORE_PACKED_PART store_part_bfloat16
#define MULTIPLY_ADD(sum, a, b) (vector) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b))
#else
#define PAIR 1
#define IN_PLACE !BF16
typedef float NAME(packed);
typedef vector NAME(operand);
#define LOAD_WEIGHT(from) LOAD(from)
#define LOAD_PACKED(from) load_float32(from)
#define STORE_PACKED store_float32
#define STORE_PACKED_PART store_part_float32
#define MULTIPLY_ADD(sum, a, b) multiply_add(sum, a, b)
#endif
#define STEP (LANES * PAIR)
#define MOST_DOTS (PAIR == 2 ? 24 : 12)  // tokens up to which dots are faster than a panel

// PAIR neighbouring weights in each lane.
INLINE NAME(operand) NAME(broadcast)(const NAME(stored) * from) {
#if PAIR == 2
  int32_t pair;
  memcpy(&pair, from, sizeof pair);
  return _mm512_set1_epi32(pair);
#else
  return splat(TO_FLOAT(*from));
#endif
}

// The `count` < STEP last weights of a row, then zeros.
INLINE NAME(operand) NAME(last_weights)(const NAME(stored) * from, int64_t count) {
  NAME(stored) padded[STEP] = {0};
  memcpy(padded, from, count * sizeof *from);
  return LOAD_WEIGHT(padded);
}

// ---- activations

// 1 / sqrt(mean(x^2) + eps).
static float NAME(inverse_rms)(const NAME(stored) * x, int64_t size, float eps) {
  vector squares = {0};
  for (int64_t k = 0; k < size; k += LANES) {
    vector value = LOAD_PART(x + k, size - k);
    squares += value * value;
  }
  return 1.0f / sqrtf(sum_of_lanes(squares) / size + eps);
}

// Tokens made ready for the products: packed rows, `padded` = a multiple of STEP apart and filled up with zeros, and where
// tokens are many also panels [padded / PAIR][16][PAIR].
typedef struct {
  int64_t tokens, inputs, padded;
  const NAME(packed) * rows;
  NAME(packed) * panels;
} NAME(activations);

enum { NAME(PACKED_BY_ALL) = 2 };  // tokens that each member packs for itself, which is faster than waiting for another

static NAME(activations) NAME(take_activations)(int64_t tokens, int64_t inputs, int64_t threads, arena *memory) {
  int64_t padded = rounded_up(inputs, STEP), copies = tokens <= NAME(PACKED_BY_ALL) ? threads : 1;
  NAME(activations) x = {tokens, inputs, padded, 0, 0};
  x.rows = take(memory, copies * tokens * padded * sizeof *x.rows);
  if (tokens > MOST_DOTS) x.panels = take(memory, rounded_up(tokens, PANEL) * padded * sizeof *x.panels);
  return x;
}

// One token, normalised with `norm` unless that is null.
INLINE void NAME(pack_token)(const NAME(stored) * x, const NAME(stored) * norm, float eps, int64_t inputs, int64_t padded,
                             NAME(packed) * to) {
  float scale = norm ? NAME(inverse_rms)(x, inputs, eps) : 1.0f;
  int64_t k = 0;
  for (; k < inputs; k += LANES) {
    vector value = LOAD_PART(x + k, inputs - k);
    STORE_PACKED(to + k, norm ? value * scale * LOAD_PART(norm + k, inputs - k) : value);
  }
  for (; k < padded; k += LANES) STORE_PACKED(to + k, (vector){0});
}

// Pack x [tokens, inputs]; what needs no change stays where it is. The team shares the work and waits for it.
static void NAME(pack)(NAME(activations) * to, const NAME(stored) * x, const NAME(stored) * norm, float eps, member m) {
  NAME(packed) *rows = (NAME(packed) *)to->rows;
  if (IN_PLACE && !norm && to->inputs == to->padded) {
    to->rows = (const NAME(packed) *)x;
  } else {
    range mine = share(to->tokens, 1, m);
    int by_all = to->tokens <= NAME(PACKED_BY_ALL);
    if (by_all) {
      rows += m.index * to->tokens * to->padded;
      to->rows = rows;
      mine = (range){0, to->tokens};
    }
    for (int64_t t = mine.first; t < mine.end; t++)
      NAME(pack_token)(x + t * to->inputs, norm, eps, to->inputs, to->padded, rows + t * to->padded);
    if (!by_all) wait_for_team();
  }
  if (to->tokens > MOST_DOTS) {
    int64_t count = to->padded / PAIR;
    transpose_words((uint32_t *)to->panels, (const uint32_t *)to->rows, to->tokens, count, count, m);
    wait_for_team();
  }
}

// ---- dots

// Elements that prefetching is ahead by. Panels are multiplied for so long that the second level will do.
enum {
  NAME(FAR) = 24576 / sizeof(NAME(stored)),
  NAME(FAR_IN_SHORT) = 16384 / sizeof(NAME(stored)),
  NAME(NEAR) = 3072 / sizeof(NAME(stored)),
  NAME(FAR_OF_PANELS) = 32768 / sizeof(NAME(stored)),
};

INLINE void NAME(prefetch_weights)(const NAME(stored) * weight, int fetch) {
  if (fetch == NO_FETCH) return;
  __builtin_prefetch(weight + (fetch == FETCH ? NAME(FAR) : NAME(FAR_IN_SHORT)), 0, 2);
  __builtin_prefetch(weight + NAME(NEAR), 0, 3);
}

// out[token * out_stride + row] = W[row] . x[token] for `rows` (1 or 4) rows and `tokens` (at most 4) tokens. What
// follows the rows is prefetched in the order in which it lies in memory: from rows that follow each other without a gap.
INLINE void NAME(dots)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * const *x, int64_t inputs, int fetch,
                       int rows, int tokens, float *out, int64_t out_stride) {
  vector sum[4][4] = {0};
  int64_t k = 0;
  for (; k + STEP <= inputs; k += STEP) {
    NAME(operand) w[4];
    UNROLL(4) for (int r = 0; r < rows; r++) {
      NAME(prefetch_weights)(weight + k * rows + r * STEP, fetch);
      w[r] = LOAD_WEIGHT(weight + r * stride + k);
      KEEP_IN_REGISTER(w[r]);
    }
    UNROLL(4) for (int m = 0; m < tokens; m++) {
      NAME(operand) values = LOAD_PACKED(x[m] + k);
      UNROLL(4) for (int r = 0; r < rows; r++) sum[m][r] = MULTIPLY_ADD(sum[m][r], w[r], values);
    }
  }
  if (k < inputs)
    UNROLL(4) for (int r = 0; r < rows; r++) {
      NAME(operand) w = NAME(last_weights)(weight + r * stride + k, inputs - k);
      UNROLL(4) for (int m = 0; m < tokens; m++) sum[m][r] = MULTIPLY_ADD(sum[m][r], w, LOAD_PACKED(x[m] + k));
    }
  if (rows == 4 && tokens >= 3) {
    float *const to[4] = {out, out + out_stride, out + 2 * out_stride, out + (tokens - 1) * out_stride};
    UNROLL(4) for (int r = 0; r < rows && tokens == 3; r++) sum[3][r] = sum[2][r];  // the same sums for the same place
    store_sums_of_lanes(sum, to);
    return;
  }
  UNROLL(4) for (int m = 0; m < tokens; m++) {
    if (rows == 4) {
      four sums = sums_of_lanes(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      memcpy(out + m * out_stride, &sums, sizeof sums);
    } else {
      out[m * out_stride] = sum_of_lanes(sum[m][0]);
    }
  }
}

// The same for any number of rows and tokens.
INLINE void NAME(every_dots)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * const *x, int64_t inputs,
                             int fetch, int64_t rows, int64_t tokens, float *out, int64_t out_stride) {
  for (int64_t row = 0; row < rows;) {
    int four_rows = row + 4 <= rows;
    const NAME(stored) *w = weight + row * stride;
    for (int64_t m = 0; m < tokens;) {
      int64_t left = tokens - m, now = left <= 4 ? left : left < 8 ? (left + 1) / 2 : 4;
      float *to = out + m * out_stride + row;
#define CASE(count)                                                             \
  case count:                                                                   \
    if (four_rows)                                                              \
      NAME(dots)(w, stride, x + m, inputs, fetch, 4, count, to, out_stride);    \
    else                                                                        \
      NAME(dots)(w, stride, x + m, inputs, NO_FETCH, 1, count, to, out_stride); \
    break;
      switch (now) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
      m += now;
    }
    row += four_rows ? 4 : 1;
  }
}

// Each way by itself: all three in one function, the first is a tenth slower from a cache.
#define ONE_WAY(name, fetch)                                                                                           \
  static __attribute__((noinline)) void NAME(name)(const NAME(stored) * weight, int64_t stride,                        \
                                                   const NAME(packed) * const *x, int64_t inputs, int64_t rows,        \
                                                   int64_t tokens, float *out, int64_t out_stride) {                   \
    NAME(every_dots)(weight, stride, x, inputs, fetch, rows, tokens, out, out_stride);                                 \
  }
ONE_WAY(dots_without_fetch, NO_FETCH)
ONE_WAY(dots_with_fetch, FETCH)
ONE_WAY(dots_of_short, FETCH_SHORT)
#undef ONE_WAY

INLINE void NAME(all_dots)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * const *x, int64_t inputs,
                           int fetch, int64_t rows, int64_t tokens, float *out, int64_t out_stride) {
  if (fetch == NO_FETCH)
    NAME(dots_without_fetch)(weight, stride, x, inputs, rows, tokens, out, out_stride);
  else if (fetch == FETCH)
    NAME(dots_with_fetch)(weight, stride, x, inputs, rows, tokens, out, out_stride);
  else
    NAME(dots_of_short)(weight, stride, x, inputs, rows, tokens, out, out_stride);
}

// ---- panels

// As many sums as there are registers for: 32 of AVX-512, elsewhere 16, where a panel takes several vectors.
enum { NAME(PANEL_ROWS) = LANES == 16 ? 8 : 4, NAME(PANELS_AT_ONCE) = LANES == 16 ? PANELS : 1 };

// out[panel][row * PANEL + lane] = W[row] . x[panel][lane] for `rows` (1 or PANEL_ROWS) rows and `panels` (1 or 2) panels of tokens,
// which lie `along` apart. One panel that fills one vector is multiplied in two sums per row, of even and of odd steps, which keeps as
// many additions in flight as two panels do.
INLINE void NAME(panel)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * x, int64_t along, int64_t inputs,
                        int rows, int panels, float *out) {
  enum { PARTS = PANEL / LANES, LINE = 64 / sizeof(NAME(stored)) };
  vector sum[NAME(PANEL_ROWS)][2][PARTS] = {0};
  int64_t k = 0;
  for (; k + LINE <= inputs; k += LINE) {
    for (int r = 0; r < rows; r++) __builtin_prefetch(weight + k * rows + r * LINE + NAME(FAR_OF_PANELS), 0, 2);
    for (int i = 0; i < LINE; i += 2 * PAIR)
      UNROLL(2) for (int odd = 0; odd < 2; odd++) {
        int64_t at = k + i + odd * PAIR;
        NAME(operand) values[2][PARTS];
        UNROLL(2) for (int n = 0; n < panels; n++)
          UNROLL(4) for (int p = 0; p < PARTS; p++) values[n][p] = LOAD_PACKED(x + n * along + at * PANEL + p * STEP);
        UNROLL(8) for (int r = 0; r < rows; r++) {
          NAME(operand) w = NAME(broadcast)(weight + r * stride + at);
          UNROLL(2) for (int n = 0; n < panels; n++)
            UNROLL(4) for (int p = 0; p < PARTS; p++) {
              vector *to = &sum[r][panels == 1 && PARTS == 1 ? odd : n][p];
              *to = MULTIPLY_ADD(*to, w, values[n][p]);
            }
        }
      }
  }
  for (; k < inputs; k += PAIR)
    UNROLL(8) for (int r = 0; r < rows; r++) {
      NAME(stored) last[2] = {weight[r * stride + k], 0};
      if (k + PAIR <= inputs) memcpy(last, weight + r * stride + k, PAIR * sizeof *last);
      NAME(operand) w = NAME(broadcast)(last);
      UNROLL(2) for (int n = 0; n < panels; n++)
        UNROLL(4) for (int p = 0; p < PARTS; p++)
          sum[r][n][p] = MULTIPLY_ADD(sum[r][n][p], w, LOAD_PACKED(x + n * along + k * PANEL + p * STEP));
    }
  UNROLL(8) for (int r = 0; r < rows; r++)
    UNROLL(4) for (int p = 0; p < PARTS; p++) {
      float *to = out + r * PANEL + p * LANES;
      if (panels == 1) {
        store_float32(to, sum[r][0][p] + sum[r][1][p]);
      } else {
        store_float32(to, sum[r][0][p]);
        store_float32(to + BLOCK * PANEL, sum[r][1][p]);
      }
    }
}

// The same for up to BLOCK rows: out[panel][BLOCK][PANEL].
static void NAME(all_panel)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * x, int64_t along, int64_t inputs,
                            int64_t rows, int64_t panels, float *out) {
  enum { ROWS = NAME(PANEL_ROWS) };
  for (int64_t row = 0; row < rows; row += row + ROWS <= rows ? ROWS : 1)
    for (int64_t n = 0; n < panels; n += NAME(PANELS_AT_ONCE)) {
      const NAME(stored) *w = weight + row * stride;
      const NAME(packed) *from = x + n * along;
      float *to = out + (n * BLOCK + row) * PANEL;
      int two = NAME(PANELS_AT_ONCE) == 2 && n + 2 <= panels;
      if (row + ROWS <= rows && two)
        NAME(panel)(w, stride, from, along, inputs, ROWS, 2, to);
      else if (row + ROWS <= rows)
        NAME(panel)(w, stride, from, along, inputs, ROWS, 1, to);
      else if (two)
        NAME(panel)(w, stride, from, along, inputs, 1, 2, to);
      else
        NAME(panel)(w, stride, from, along, inputs, 1, 1, to);
    }
}

// ---- either

enum { NAME(PRODUCT) = PANELS * PANEL * BLOCK };  // floats that a product fills

// How many tokens from `first` on are multiplied together.
INLINE int64_t NAME(tokens_now)(const NAME(activations) * x, int64_t first) {
  return x->tokens <= MOST_DOTS ? x->tokens : least(PANELS * PANEL, x->tokens - first);
}

// out[token * BLOCK + row] = W[row] . x[first + token], for up to BLOCK rows and `tokens_now` tokens.
static void NAME(product)(const NAME(stored) * weight, int64_t rows, const NAME(activations) * x, int64_t first, float *out) {
  if (x->tokens <= MOST_DOTS) {
    const NAME(packed) * pointers[MOST_DOTS];
    for (int64_t t = 0; t < x->tokens; t++) pointers[t] = x->rows + t * x->padded;
    NAME(all_dots)(weight, x->inputs, pointers, x->inputs, FETCH, rows, x->tokens, out, BLOCK);
    return;
  }
  int64_t panels = (NAME(tokens_now)(x, first) + PANEL - 1) / PANEL;
  NAME(all_panel)(weight, x->inputs, x->panels + first * x->padded, PANEL * x->padded, x->inputs, rows, panels, out);
  for (int64_t n = 0; n < panels; n++) transpose_square(out + n * PANEL * BLOCK);
}

// ---- mix

// out[m][c] = factor[m] out[m][c] + sum over s < count of coefficient(m, s) rows[s][c], for `tokens` (at most 4) at once and the
// first `width` of `vectors` (1 or 4) vectors of columns. The packed coefficient lies at m * along + s; of pairs, the one after
// the last is 0.
#if PAIR == 2
// Two rows at a time: neighbours of one column meet in each lane.
INLINE void NAME(mix_tile)(const NAME(stored) * rows, int64_t stride, int64_t count, int64_t width,
                           const NAME(packed) * coefficients, int64_t along, const float *factor, int tokens, int vectors,
                           float *out, int64_t out_stride) {
  static const NAME(stored) nothing[4 * LANES] = {0};  // the row after the last of an odd number
  enum { MOST = 2 };
  int steps = vectors == 4 ? 2 : 1;
  vector sum[4][MOST][2] = {0};
  for (int64_t s = 0; s < count; s += 2) {
    const NAME(stored) *row = rows + s * stride, *next = s + 1 < count ? row + stride : nothing;
    NAME(operand) pairs[MOST][2];
    UNROLL(2) for (int v = 0; v < steps; v++) {
      __m512i upper, lower;
      if (vectors == 4) {
        upper = LOAD_WEIGHT(row + v * STEP), lower = LOAD_WEIGHT(next + v * STEP);
      } else {
        upper = NAME(last_weights)(row, least(STEP, width)), lower = NAME(last_weights)(next, least(STEP, width));
      }
      pairs[v][0] = _mm512_unpacklo_epi16(upper, lower);  // columns 0 to 3 of every 8
      pairs[v][1] = _mm512_unpackhi_epi16(upper, lower);  // columns 4 to 7
    }
    UNROLL(4) for (int m = 0; m < tokens; m++) {
      NAME(operand) coefficient = NAME(broadcast)(coefficients + m * along + s);
      UNROLL(2) for (int v = 0; v < steps; v++)
        UNROLL(2) for (int i = 0; i < 2; i++) sum[m][v][i] = MULTIPLY_ADD(sum[m][v][i], coefficient, pairs[v][i]);
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  UNROLL(4) for (int m = 0; m < tokens; m++)
    UNROLL(2) for (int v = 0; v < steps; v++)
      UNROLL(2) for (int i = 0; i < 2; i++) {
        __m512 four_by_four = _mm512_permutex2var_ps((__m512)sum[m][v][0], i ? second : first, (__m512)sum[m][v][1]);
        float *to = out + m * out_stride + v * STEP + i * LANES;
        int64_t lanes = vectors == 4 ? LANES : most(0, width - i * LANES);
        store_part_float32(to, load_part_float32(to, lanes) * factor[m] + (vector)four_by_four, lanes);
      }
}
enum { NAME(NARROW) = STEP };
#else
INLINE void NAME(mix_tile)(const NAME(stored) * rows, int64_t stride, int64_t count, int64_t width,
                           const NAME(packed) * coefficients, int64_t along, const float *factor, int tokens, int vectors,
                           float *out, int64_t out_stride) {
  vector sum[4][4] = {0};
  for (int64_t s = 0; s < count; s++) {
    vector row[4];
    UNROLL(4) for (int v = 0; v < vectors; v++) {
      row[v] = vectors == 4 ? LOAD(rows + s * stride + v * LANES) : LOAD_PART(rows + s * stride, width);
      KEEP_IN_REGISTER(row[v]);
    }
    UNROLL(4) for (int m = 0; m < tokens; m++) {
      vector coefficient = splat(coefficients[m * along + s]);
      UNROLL(4) for (int v = 0; v < vectors; v++) sum[m][v] += coefficient * row[v];
    }
  }
  UNROLL(4) for (int m = 0; m < tokens; m++)
    UNROLL(4) for (int v = 0; v < vectors; v++) {
      float *to = out + m * out_stride + v * LANES;
      int64_t lanes = vectors == 4 ? LANES : width;
      store_part_float32(to, load_part_float32(to, lanes) * factor[m] + sum[m][v], lanes);
    }
}
enum { NAME(NARROW) = LANES };
#endif

INLINE void NAME(mix_tokens)(const NAME(stored) * rows, int64_t stride, int64_t count, int64_t width,
                             const NAME(packed) * coefficients, int64_t along, const float *factor, int tokens, float *out,
                             int64_t out_stride) {
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES)
    NAME(mix_tile)(rows + c, stride, count, width - c, coefficients, along, factor, tokens, 4, out + c, out_stride);
  for (; c < width; c += NAME(NARROW))
    NAME(mix_tile)(rows + c, stride, count, width - c, coefficients, along, factor, tokens, 1, out + c, out_stride);
}

// out [tokens, width] = factor out + coefficients [tokens, count] rows [count, width].
static void NAME(mix)(const NAME(stored) * rows, int64_t stride, int64_t count, int64_t width,
                      const NAME(packed) * coefficients, int64_t along, const float *factor, int64_t tokens, float *out,
                      int64_t out_stride) {
  for (int64_t m = 0, now; m < tokens; m += now) {
    now = least(4, tokens - m);
    const NAME(packed) *from = coefficients + m * along;
    float *to = out + m * out_stride;
#define CASE(tokens)                                                                                        \
  case tokens:                                                                                              \
    NAME(mix_tokens)(rows, stride, count, width, from, along, factor + m, tokens, to, out_stride);          \
    break;
    switch (now) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
  }
}
