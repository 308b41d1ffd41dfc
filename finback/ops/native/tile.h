// Tiles of products, and what they are made from, for one stored type: of grouped.c and causal.c.
//
// Operands are seen in words of 32 bits: one float, or two bfloat16 that are neighbours along the dimension that is summed over, as the
// processor's dot product takes them. With AVX-512 a tile of the result, 6 rows by 64 columns, stays in 24 of 32 registers while that
// dimension is walked along once: 4 loads of the right operand, packed into a panel that lies in a cache, and 6 words of the left one for
// 24 multiplications. With AVX2 it is 6 rows by 16 columns in 12 of 16 registers: 2 loads and 6 words for 12 multiplications.

#if BF16 && defined(__AVX512BF16__)
INLINE vector NAME(multiply_add)(vector sum, words a, words b) {
  return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE void NAME(store_sum)(STORED *to, vector value, int64_t count) {
  halves bits = (halves)_mm512_cvtneps_pbh((__m512)value);
  memcpy(to, &bits, count >= LANES ? sizeof bits : count * sizeof *to);
}
#elif BF16
INLINE vector NAME(multiply_add)(vector sum, words a, words b) {
  sum = multiply_add(sum, (vector)(a << 16), (vector)(b << 16));
  return multiply_add(sum, (vector)(a >> 16 << 16), (vector)(b >> 16 << 16));
}
INLINE void NAME(store_sum)(STORED *to, vector value, int64_t count) { store_part_bfloat16(to, value, count); }
#else
INLINE vector NAME(multiply_add)(vector sum, words a, words b) { return multiply_add(sum, (vector)a, (vector)b); }
INLINE void NAME(store_sum)(STORED *to, vector value, int64_t count) { store_part_float32(to, value, count); }
#endif

// ---- one tile

// `rows` rows of the first `across` vectors of a panel's columns: word i of row m of the left operand is a[m][i * a_step], of the panel
// b[i * TILE_COLUMNS]. Sums are added to `from`, if it is there, and go to `sums`, both float32 in rows of TILE_COLUMNS, or
// rounded to `y`; only `columns` of them are there.
INLINE void NAME(tile)(const int rows, const int across, const uint32_t *const *a, int64_t a_step, const uint32_t *b, int64_t depth,
                       const float *from, float *sums, STORED *y, int64_t y_row, int64_t columns) {
  vector sum[TILE_ROWS][TILE_VECTORS];
  UNROLL(6) for (int m = 0; m < rows; m++) UNROLL(4) for (int j = 0; j < across; j++) sum[m][j] = splat(0);
  for (int64_t i = 0; i < depth; i++) {
    words right[TILE_VECTORS];  // each loaded by itself: all at once would go through the stack
    UNROLL(4) for (int j = 0; j < across; j++) memcpy(right + j, b + i * TILE_COLUMNS + LANES * j, sizeof *right);
    UNROLL(6) for (int m = 0; m < rows; m++) {
      words left = a[m][i * a_step] - (words){0};
      UNROLL(4) for (int j = 0; j < across; j++) sum[m][j] = NAME(multiply_add)(sum[m][j], left, right[j]);
    }
  }
  UNROLL(6) for (int m = 0; m < rows; m++) UNROLL(4) for (int j = 0; j < across; j++) {
    if (columns <= LANES * j) break;
    if (from) sum[m][j] += load_part_float32(from + m * TILE_COLUMNS + LANES * j, columns - LANES * j);
    if (sums)
      store_part_float32(sums + m * TILE_COLUMNS + LANES * j, sum[m][j], columns - LANES * j);
    else
      NAME(store_sum)(y + m * y_row + LANES * j, sum[m][j], columns - LANES * j);
  }
}

// Any number of rows up to that of a tile, wherever they lie, and of columns.
static void NAME(tile_of_rows)(int64_t rows, const uint32_t *const *a, int64_t a_step, const uint32_t *b, int64_t depth,
                               const float *from, float *sums, STORED *y, int64_t y_row, int64_t columns) {
#define TILE_OF(count)                                                              \
  case count:                                                                       \
    if (columns > TILE_VECTORS / 2 * LANES)                                         \
      NAME(tile)(count, TILE_VECTORS, a, a_step, b, depth, from, sums, y, y_row, columns);     \
    else                                                                            \
      NAME(tile)(count, TILE_VECTORS / 2, a, a_step, b, depth, from, sums, y, y_row, columns); \
    break;
  switch (rows) { TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6) }
#undef TILE_OF
}

// The same of rows that lie `a_row` words apart.
INLINE void NAME(tile_of)(int64_t rows, const uint32_t *a, int64_t a_row, int64_t a_step, const uint32_t *b, int64_t depth,
                          const float *from, float *sums, STORED *y, int64_t y_row, int64_t columns) {
  const uint32_t *at[TILE_ROWS];
  for (int64_t m = 0; m < TILE_ROWS; m++) at[m] = a + least(m, rows - 1) * a_row;
  NAME(tile_of_rows)(rows, at, a_step, b, depth, from, sums, y, y_row, columns);
}

// ---- packing

// A panel of a matrix [columns, K] whose rows, `row` words apart, become the panel's columns: to [depth, TILE_COLUMNS].
static void NAME(pack_rows)(const uint32_t *from, int64_t row, int64_t columns, int64_t depth, uint32_t *to) {
  for (int64_t j = 0; j < TILE_COLUMNS; j += LANES)
    for (int64_t i = 0; i < depth; i += LANES) {
      int64_t now = least(LANES, depth - i);
      words block[LANES] = {0};
      if (now == LANES && columns - j >= LANES) {  // of known size: whole vectors, kept in registers
        UNROLL(16) for (int r = 0; r < LANES; r++) memcpy(block + r, from + (j + r) * row + i, sizeof *block);
        transpose(block);
        UNROLL(16) for (int d = 0; d < LANES; d++) memcpy(to + (i + d) * TILE_COLUMNS + j, block + d, sizeof *block);
        continue;
      }
      for (int64_t r = 0; r < least(LANES, columns - j); r++) memcpy(block + r, from + (j + r) * row + i, now * sizeof *from);
      transpose(block);
      for (int64_t d = 0; d < now; d++) memcpy(to + (i + d) * TILE_COLUMNS + j, block + d, sizeof *block);
    }
}

// The first `count` words at `from`, whose second halves, if there are any, are of the row at `below`.
INLINE words NAME(words_of)(const STORED *from, const STORED *below, int64_t count) {
#if BF16
  words low = (words)load_part_bfloat16(from, count) >> 16;
  return below ? low | (words)load_part_bfloat16(below, count) : low;
#else
  (void)below;
  return (words)load_part_float32(from, count);
#endif
}

// `width` columns of a matrix of `columns`, whose rows are `row` elements apart: its first `summed` rows, or those that `order` names,
// to [depth, width], with zeros where there are no more columns.
INLINE void NAME(pack_columns)(const STORED *from, int64_t row, const int64_t *order, int64_t columns, int64_t summed, uint32_t *to,
                               const int64_t width) {
  int64_t depth = (summed + PER_WORD - 1) / PER_WORD, paired = summed / PER_WORD;
  for (int64_t i = 0; i < depth; i++) {
    int64_t first = i * PER_WORD, next = first + PER_WORD - 1;
    const STORED *at = from + (order ? order[first] : first) * row, *below = 0;
    if (i < paired) below = from + (order ? order[next] : next) * row;
    if (columns >= width && below) {
      UNROLL(6) for (int64_t j = 0; j < width; j += LANES) {
        words block = NAME(words_of)(at + j, below + j, LANES);
        memcpy(to + i * width + j, &block, sizeof block);
      }
    } else {
      for (int64_t j = 0; j < width; j += LANES) {
        words block = {0};
        if (columns > j) block = NAME(words_of)(at + j, below ? below + j : 0, columns - j);
        memcpy(to + i * width + j, &block, sizeof block);
      }
    }
  }
}
