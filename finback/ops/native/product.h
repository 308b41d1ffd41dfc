// Matrix products with few rows of activations, for one stored type: included twice, with BF16 0 and 1.
//
// y = W x for W [rows, inputs] as it lies in memory (nothing is ever repacked) and up to a few dozen tokens x. Every weight
// is read once from memory; while a block of rows is multiplied, the next one is prefetched, so the time is the larger of
// reading and multiplying and not their sum. Sums are float32.
//
//   dots    few tokens: 4 rows of W against up to 6 tokens, vectors along the inputs, lanes summed at the end.
//   panel   up to 16 tokens: one token per lane, so no sums over lanes; each weight is broadcast against a vector of tokens.
//   mix     the transposed product, x W: rows of W added up with a coefficient each.
//
// Activations are packed first. In float32 they stay as they are; in bfloat16, where the processor multiplies pairs
// (AVX512-BF16), they are rounded to bfloat16, as torch's product does; elsewhere they are float32 and weights are widened.

#if BF16
typedef uint16_t NAME(stored);
#define TO_FLOAT(value) float_of_bfloat16(value)
#define FROM_FLOAT(value) bfloat16_of_float(value)
#define LOAD_STORED(from) load_bfloat16(from)
#else
typedef float NAME(stored);
#define TO_FLOAT(value) (value)
#define FROM_FLOAT(value) (value)
#define LOAD_STORED(from) load_float32(from)
#endif

// One step multiplies LANES times PAIR inputs: PAIR neighbours meet in each 32-bit lane.
#if BF16 && defined(__AVX512BF16__)
#define PAIR 2
typedef uint16_t NAME(packed);
typedef __m512i NAME(operand);
#define TO_PACKED(value) bfloat16_of_float(value)
#define LOAD_WEIGHT(from) _mm512_loadu_si512(from)
#define LOAD_PACKED(from) _mm512_loadu_si512(from)
#define MULTIPLY_ADD(sum, a, b) (vector) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b))
#else
#define PAIR 1
typedef float NAME(packed);
typedef vector NAME(operand);
#define TO_PACKED(value) (value)
#define LOAD_WEIGHT(from) LOAD_STORED(from)
#define LOAD_PACKED(from) load_float32(from)
#define MULTIPLY_ADD(sum, a, b) ((sum) + (a) * (b))
#endif
#define STEP (LANES * PAIR)

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

// 1 / sqrt(mean(x^2) + eps).
static float NAME(inverse_rms)(const NAME(stored) * x, int64_t size, float eps) {
  vector squares = {0};
  float rest = 0;
  int64_t k = 0;
  for (; k + LANES <= size; k += LANES) squares += LOAD_STORED(x + k) * LOAD_STORED(x + k);
  for (; k < size; k++) rest += TO_FLOAT(x[k]) * TO_FLOAT(x[k]);
  return 1.0f / sqrtf((sum_of_lanes(squares) + rest) / size + eps);
}

// How many elements ahead to prefetch: the next block of `rows` rows, or further along in long ones.
INLINE int64_t NAME(distance)(int64_t stride, int64_t rows) {
  int64_t long_row = 8192 / sizeof(NAME(stored));
  return stride <= long_row ? stride * rows : long_row / 4;
}

// out[row * PANEL + token] = W[row] . x[token] for `rows` (1 or 4) rows and `tokens` (at most 6) tokens.
INLINE void NAME(dots)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * const *x, int64_t inputs, int rows,
                       int tokens, float *out) {
  vector sum[6][4] = {0};
  int64_t ahead = NAME(distance)(stride, rows), k = 0;
  for (; k + STEP <= inputs; k += STEP) {
    NAME(operand) w[4];
    UNROLL(4) for (int r = 0; r < rows; r++) {
      __builtin_prefetch(weight + r * stride + k + ahead);
      w[r] = LOAD_WEIGHT(weight + r * stride + k);
    }
    UNROLL(6) for (int m = 0; m < tokens; m++) {
      NAME(operand) values = LOAD_PACKED(x[m] + k);
      UNROLL(4) for (int r = 0; r < rows; r++) sum[m][r] = MULTIPLY_ADD(sum[m][r], w[r], values);
    }
  }
  if (k < inputs)
    UNROLL(4) for (int r = 0; r < rows; r++) {
      NAME(operand) w = NAME(last_weights)(weight + r * stride + k, inputs - k);
      UNROLL(6) for (int m = 0; m < tokens; m++) sum[m][r] = MULTIPLY_ADD(sum[m][r], w, LOAD_PACKED(x[m] + k));
    }
  UNROLL(6) for (int m = 0; m < tokens; m++) {
    if (rows == 4) {
      four sums = sums_of_lanes(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
      for (int r = 0; r < 4; r++) out[r * PANEL + m] = sums[r];
    } else {
      out[m] = sum_of_lanes(sum[m][0]);
    }
  }
}

// The same for any number of rows and tokens: out[row * PANEL + token], tokens <= PANEL.
static void NAME(all_dots)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * const *x, int64_t inputs,
                           int64_t rows, int64_t tokens, float *out) {
  for (int64_t row = 0; row < rows;) {
    int four_rows = row + 4 <= rows;
    const NAME(stored) *w = weight + row * stride;
    float *to = out + row * PANEL;
    for (int64_t m = 0; m < tokens;) {
      int64_t left = tokens - m, now = left <= 6 ? left : left < 12 ? (left + 1) / 2 : 6;
#define CASE(count)                                              \
  case count:                                                    \
    if (four_rows)                                               \
      NAME(dots)(w, stride, x + m, inputs, 4, count, to + m);    \
    else                                                         \
      NAME(dots)(w, stride, x + m, inputs, 1, count, to + m);    \
    break;
      switch (now) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
      m += now;
    }
    row += four_rows ? 4 : 1;
  }
}

// out[row * PANEL + lane] = W[row] . x[lane] for `rows` (1 or 8) rows and a panel of 16 tokens.
INLINE void NAME(panel)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * x, int64_t inputs, int rows,
                        float *out) {
  enum { PARTS = PANEL / LANES, LINE = 64 / sizeof(NAME(stored)) };
  vector sum[8][PARTS] = {0};
  int64_t ahead = NAME(distance)(stride, rows), k = 0;
  for (; k + PAIR <= inputs; k += PAIR) {
    if (k % LINE == 0)
      for (int r = 0; r < rows; r++) __builtin_prefetch(weight + r * stride + k + ahead);
    NAME(operand) values[PARTS];
    UNROLL(4) for (int p = 0; p < PARTS; p++) values[p] = LOAD_PACKED(x + k * PANEL + p * STEP);
    UNROLL(8) for (int r = 0; r < rows; r++) {
      NAME(operand) w = NAME(broadcast)(weight + r * stride + k);
      UNROLL(4) for (int p = 0; p < PARTS; p++) sum[r][p] = MULTIPLY_ADD(sum[r][p], w, values[p]);
    }
  }
#if PAIR == 2
  if (k < inputs)
    UNROLL(8) for (int r = 0; r < rows; r++) {
      NAME(operand) w = _mm512_set1_epi32(weight[r * stride + k]);  // the second of the pair is 0
      sum[r][0] = MULTIPLY_ADD(sum[r][0], w, LOAD_PACKED(x + k * PANEL));
    }
#endif
  UNROLL(8) for (int r = 0; r < rows; r++)
    UNROLL(4) for (int p = 0; p < PARTS; p++) store_float32(out + r * PANEL + p * LANES, sum[r][p]);
}

static void NAME(all_panel)(const NAME(stored) * weight, int64_t stride, const NAME(packed) * x, int64_t inputs, int64_t rows,
                            float *out) {
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8) NAME(panel)(weight + row * stride, stride, x, inputs, 8, out + row * PANEL);
  for (; row < rows; row++) NAME(panel)(weight + row * stride, stride, x, inputs, 1, out + row * PANEL);
}

// out[m][c] = factor[m] out[m][c] + sum over s < count of coefficient(m, s) rows[s][c], for `tokens` (1, 2 or 4) at once and
// `vectors` (1 or 4) of columns. The coefficient lies at m * along_tokens + s * along_rows.
INLINE void NAME(mix_tile)(const NAME(stored) * rows, int64_t stride, int64_t count, const float *coefficients,
                           int64_t along_tokens, int64_t along_rows, const float *factor, int tokens, int vectors, float *out,
                           int64_t out_stride) {
  vector sum[4][4] = {0};
  for (int64_t s = 0; s < count; s++) {
    vector row[4];
    UNROLL(4) for (int v = 0; v < vectors; v++) row[v] = LOAD_STORED(rows + s * stride + v * LANES);
    UNROLL(4) for (int m = 0; m < tokens; m++) {
      vector coefficient = splat(coefficients[m * along_tokens + s * along_rows]);
      UNROLL(4) for (int v = 0; v < vectors; v++) sum[m][v] += coefficient * row[v];
    }
  }
  UNROLL(4) for (int m = 0; m < tokens; m++)
    UNROLL(4) for (int v = 0; v < vectors; v++) {
      float *to = out + m * out_stride + v * LANES;
      store_float32(to, load_float32(to) * factor[m] + sum[m][v]);
    }
}

INLINE void NAME(mix_tokens)(const NAME(stored) * rows, int64_t stride, int64_t count, int64_t width, const float *coefficients,
                             int64_t along_tokens, int64_t along_rows, const float *factor, int tokens, float *out,
                             int64_t out_stride) {
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES)
    NAME(mix_tile)(rows + c, stride, count, coefficients, along_tokens, along_rows, factor, tokens, 4, out + c, out_stride);
  for (; c + LANES <= width; c += LANES)
    NAME(mix_tile)(rows + c, stride, count, coefficients, along_tokens, along_rows, factor, tokens, 1, out + c, out_stride);
  for (; c < width; c++)
    for (int m = 0; m < tokens; m++) {
      float sum = 0;
      for (int64_t s = 0; s < count; s++)
        sum += coefficients[m * along_tokens + s * along_rows] * TO_FLOAT(rows[s * stride + c]);
      out[m * out_stride + c] = out[m * out_stride + c] * factor[m] + sum;
    }
}

// out [tokens, width] = factor out + coefficients [tokens, count] rows [count, width].
static void NAME(mix)(const NAME(stored) * rows, int64_t stride, int64_t count, int64_t width, const float *coefficients,
                      int64_t along_tokens, int64_t along_rows, const float *factor, int64_t tokens, float *out,
                      int64_t out_stride) {
  int64_t m = 0;
#define MIX(now)                                                                                                       \
  for (; m + now <= tokens; m += now)                                                                                  \
    NAME(mix_tokens)(rows, stride, count, width, coefficients + m * along_tokens, along_tokens, along_rows, factor + m, \
                     now, out + m * out_stride, out_stride);
  MIX(4) MIX(2) MIX(1)
#undef MIX
}

// Tokens made ready for the products: packed rows, filled up with zeros to a multiple of STEP, and where tokens are many
// also panels [padded / PAIR][16][PAIR].
typedef struct {
  int64_t tokens, inputs, padded;
  NAME(packed) * rows, *panels;
} NAME(activations);

static NAME(activations) NAME(new_activations)(int64_t tokens, int64_t inputs) {
  int64_t padded = (inputs + STEP - 1) / STEP * STEP, panels = tokens > MOST_DOTS ? (tokens + PANEL - 1) / PANEL : 0;
  NAME(activations) x = {tokens, inputs, padded, 0, 0};
  x.rows = allocate((tokens + panels * PANEL) * padded * sizeof(NAME(packed)));
  x.panels = x.rows + tokens * padded;
  return x;
}

// Pack x [tokens, inputs], normalised with `norm` [inputs] unless that is null. The team shares the work; all wait for it.
static void NAME(pack)(NAME(activations) * to, const NAME(stored) * x, const NAME(stored) * norm, float eps, member m) {
  int64_t inputs = to->inputs;
  range mine = share(to->tokens, 1, m);
  for (int64_t token = mine.first; token < mine.end; token++) {
    const NAME(stored) *from = x + token * inputs;
    NAME(packed) *row = to->rows + token * to->padded;
    float scale = norm ? NAME(inverse_rms)(from, inputs, eps) : 1.0f;
    for (int64_t k = 0; k < inputs; k++) {
      float value = TO_FLOAT(from[k]);
      row[k] = TO_PACKED(norm ? value * scale * TO_FLOAT(norm[k]) : value);
    }
    for (int64_t k = inputs; k < to->padded; k++) row[k] = 0;
  }
  wait_for_team();
  if (to->tokens > MOST_DOTS) {
    transpose_words((uint32_t *)to->panels, (const uint32_t *)to->rows, to->tokens, to->padded / PAIR, m);
    wait_for_team();
  }
}

// out[row * PANEL + token] = W[row] . x[first + token] for up to PANEL tokens from `first` on.
static void NAME(product)(const NAME(stored) * weight, int64_t rows, const NAME(activations) * x, int64_t first, float *out) {
  if (x->tokens > MOST_DOTS) {
    NAME(all_panel)(weight, x->inputs, x->panels + first * x->padded, x->inputs, rows, out);
    return;
  }
  const NAME(packed) * pointers[MOST_DOTS];
  for (int64_t m = 0; m < x->tokens; m++) pointers[m] = x->rows + m * x->padded;
  NAME(all_dots)(weight, x->inputs, pointers, x->inputs, rows, x->tokens, out);
}
