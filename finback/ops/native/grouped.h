// The products of grouped.c for one stored type.

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
  sum += (vector)(a << 16) * (vector)(b << 16);
  return sum + (vector)(a >> 16 << 16) * (vector)(b >> 16 << 16);
}
INLINE void NAME(store_sum)(STORED *to, vector value, int64_t count) { store_part_bfloat16(to, value, count); }
#else
INLINE vector NAME(multiply_add)(vector sum, words a, words b) { return sum + (vector)a * (vector)b; }
INLINE void NAME(store_sum)(STORED *to, vector value, int64_t count) { store_part_float32(to, value, count); }
#endif

// ---- one tile

// `rows` rows of a panel's columns: word i of row m of the left operand is a[m * a_row + i * a_step], of the panel b[i * TILE_COLUMNS].
// Sums are added to `from`, if it is there, and go to `sums`, both float32 in rows of TILE_COLUMNS, or rounded to `y`; only `columns`
// of them are there.
INLINE void NAME(tile)(const int rows, const uint32_t *a, int64_t a_row, int64_t a_step, const uint32_t *b, int64_t depth,
                       const float *from, float *sums, STORED *y, int64_t y_row, int64_t columns) {
  vector sum[TILE_ROWS][4];
  UNROLL(6) for (int m = 0; m < rows; m++) UNROLL(4) for (int j = 0; j < 4; j++) sum[m][j] = splat(0);
  for (int64_t i = 0; i < depth; i++) {
    words right[4];  // each loaded by itself: all at once would go through the stack
    UNROLL(4) for (int j = 0; j < 4; j++) memcpy(right + j, b + i * TILE_COLUMNS + LANES * j, sizeof *right);
    UNROLL(6) for (int m = 0; m < rows; m++) {
      words left = a[m * a_row + i * a_step] - (words){0};
      UNROLL(4) for (int j = 0; j < 4; j++) sum[m][j] = NAME(multiply_add)(sum[m][j], left, right[j]);
    }
  }
  UNROLL(6) for (int m = 0; m < rows; m++) UNROLL(4) for (int j = 0; j < 4; j++) {
    if (columns <= LANES * j) break;
    if (from) sum[m][j] += load_part_float32(from + m * TILE_COLUMNS + LANES * j, columns - LANES * j);
    if (sums)
      store_part_float32(sums + m * TILE_COLUMNS + LANES * j, sum[m][j], columns - LANES * j);
    else
      NAME(store_sum)(y + m * y_row + LANES * j, sum[m][j], columns - LANES * j);
  }
}

// Any number of rows up to that of a tile.
INLINE void NAME(tile_of)(int64_t rows, const uint32_t *a, int64_t a_row, int64_t a_step, const uint32_t *b, int64_t depth,
                          const float *from, float *sums, STORED *y, int64_t y_row, int64_t columns) {
#define TILE_OF(count) \
  case count: NAME(tile)(count, a, a_row, a_step, b, depth, from, sums, y, y_row, columns); break;
  switch (rows) { TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6) }
#undef TILE_OF
}

// ---- packing

// A panel of a matrix [columns, K] whose rows, `row` words apart, become the panel's columns: to [depth, TILE_COLUMNS].
static void NAME(pack_rows)(const uint32_t *from, int64_t row, int64_t columns, int64_t depth, uint32_t *to) {
  for (int64_t j = 0; j < TILE_COLUMNS; j += LANES)
    for (int64_t i = 0; i < depth; i += LANES) {
      int64_t now = least(LANES, depth - i);
      words block[LANES] = {0};
      for (int64_t r = 0; r < least(LANES, columns - j); r++) memcpy(block + r, from + (j + r) * row + i, now * sizeof *from);
      transpose(block);
      for (int64_t d = 0; d < now; d++) memcpy(to + (i + d) * TILE_COLUMNS + j, block + d, sizeof *block);
    }
}

// The words at `from`, whose second halves, if there are any, are of the row below; `count` of them are there.
INLINE words NAME(words_of)(const STORED *from, int64_t row, int has_next, int64_t count) {
#if BF16
  words low = (words)load_part_bfloat16(from, count) >> 16;
  return has_next ? low | (words)load_part_bfloat16(from + row, count) : low;
#else
  (void)row, (void)has_next;
  return (words)load_part_float32(from, count);
#endif
}

// `width` columns of a matrix [K, columns], whose rows are `row` elements apart and `summed` in number: to [depth, width], with zeros
// where there are no more columns.
INLINE void NAME(pack_columns)(const STORED *from, int64_t row, int64_t columns, int64_t summed, uint32_t *to, const int64_t width) {
  int64_t depth = (summed + PER_WORD - 1) / PER_WORD, paired = summed / PER_WORD;
  for (int64_t i = 0; i < depth; i++) {
    const STORED *at = from + i * PER_WORD * row;
    if (columns >= width && i < paired) {
      UNROLL(6) for (int64_t j = 0; j < width; j += LANES) {
        words block = NAME(words_of)(at + j, row, 1, LANES);
        memcpy(to + i * width + j, &block, sizeof block);
      }
    } else {
      for (int64_t j = 0; j < width; j += LANES) {
        words block = {0};
        if (columns > j) block = NAME(words_of)(at + j, row, i < paired, columns - j);
        memcpy(to + i * width + j, &block, sizeof block);
      }
    }
  }
}

// ---- products

// y [M, columns]: rows starts[g] to starts[g + 1] of x [M, K] times the matrix of group g, with K in words: `depth`. Matrices are
// [groups, columns, K] (`turned`), or [groups, K, columns]. panels [threads, depth, TILE_COLUMNS].
void NAME(grouped_product)(const uint32_t *x, const STORED *w, STORED *y, const int64_t *starts, uint32_t *panels, int64_t groups,
                           int64_t depth, int64_t columns, int64_t turned, int64_t threads) {
  int64_t largest = 0, across = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
  for (int64_t g = 0; g < groups; g++) largest = most(largest, starts[g + 1] - starts[g]);
  int64_t blocks = (largest + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  PRAGMA(omp parallel for num_threads((int)threads) schedule(dynamic))
  for (int64_t task = 0; task < groups * blocks * across; task++) {
    int64_t g = task / (blocks * across), column = task % across * TILE_COLUMNS, here = columns - column;
    int64_t row = starts[g] + task / across % blocks * ROWS_AT_ONCE, end = least(starts[g + 1], row + ROWS_AT_ONCE);
    if (row >= end) continue;
    uint32_t *panel = panels + this_thread() * depth * TILE_COLUMNS;
    const STORED *matrix = w + g * depth * PER_WORD * columns;
    if (turned)
      NAME(pack_rows)((const uint32_t *)matrix + column * depth, depth, here, depth, panel);
    else
      NAME(pack_columns)(matrix + column, columns, here, depth * PER_WORD, panel, TILE_COLUMNS);
    for (; row < end; row += TILE_ROWS)
      NAME(tile_of)(least(TILE_ROWS, end - row), x + row * depth, depth, 1, panel, depth, 0, 0, y + row * columns + column, columns, here);
  }
}

// For each group the sum over its rows of left_i right_i^T: left [M, height], right [M, width] -> y [groups, height, width], 0 for a
// group without rows. `strips` has room for as many words as all groups have in depth times ceil(height / STRIP) * STRIP;
// panels [threads, DEPTH_AT_ONCE, TILE_COLUMNS], sums [threads, ROWS_AT_ONCE, TILE_COLUMNS].
void NAME(grouped_outer)(const STORED *left, const STORED *right, STORED *y, const int64_t *starts, uint32_t *strips,
                         uint32_t *panels, float *sums, int64_t groups, int64_t height, int64_t width, int64_t threads) {
  enum { SUMMED_AT_ONCE = DEPTH_AT_ONCE * PER_WORD };
  int64_t down = (height + STRIP - 1) / STRIP, across = (width + TILE_COLUMNS - 1) / TILE_COLUMNS, largest = 0;
  int64_t first[groups + 1];  // words in depth before each group
  first[0] = 0;
  for (int64_t g = 0; g < groups; g++) {
    int64_t rows = starts[g + 1] - starts[g];
    first[g + 1] = first[g] + (rows + PER_WORD - 1) / PER_WORD;
    largest = most(largest, rows);
  }
  int64_t blocks = (largest + SUMMED_AT_ONCE - 1) / SUMMED_AT_ONCE;
  PRAGMA(omp parallel for num_threads((int)threads) schedule(dynamic))
  for (int64_t task = 0; task < groups * blocks * down; task++) {
    int64_t g = task / (blocks * down), block = task / down % blocks, column = task % down * STRIP;
    int64_t row = starts[g] + block * SUMMED_AT_ONCE, summed = least(SUMMED_AT_ONCE, starts[g + 1] - row);
    if (summed <= 0) continue;
    uint32_t *to = strips + (first[g] + block * DEPTH_AT_ONCE) * down * STRIP + column * ((summed + PER_WORD - 1) / PER_WORD);
    NAME(pack_columns)(left + row * height + column, height, height - column, summed, to, STRIP);
  }
  int64_t parts = (height + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  PRAGMA(omp parallel for num_threads((int)threads) schedule(dynamic))
  for (int64_t task = 0; task < groups * parts * across; task++) {
    int64_t g = task / (parts * across), top = task / across % parts * ROWS_AT_ONCE, column = task % across * TILE_COLUMNS;
    int64_t bottom = least(height, top + ROWS_AT_ONCE), here = width - column;
    uint32_t *panel = panels + this_thread() * DEPTH_AT_ONCE * TILE_COLUMNS;
    float *sum = sums + this_thread() * ROWS_AT_ONCE * TILE_COLUMNS;
    STORED *to = y + (g * height + top) * width + column;
    if (starts[g] == starts[g + 1])
      for (int64_t m = 0; m < bottom - top; m++) memset(to + m * width, 0, least(here, TILE_COLUMNS) * sizeof *to);
    for (int64_t row = starts[g], block = 0; row < starts[g + 1]; row += SUMMED_AT_ONCE, block++) {
      int64_t summed = least(SUMMED_AT_ONCE, starts[g + 1] - row), depth = (summed + PER_WORD - 1) / PER_WORD;
      int last = row + SUMMED_AT_ONCE >= starts[g + 1];
      const uint32_t *packed = strips + (first[g] + block * DEPTH_AT_ONCE) * down * STRIP;
      NAME(pack_columns)(right + row * width + column, width, here, summed, panel, TILE_COLUMNS);
      for (int64_t m = 0; m < bottom - top; m += TILE_ROWS) {
        const float *from = block ? sum + m * TILE_COLUMNS : 0;
        float *kept = last ? 0 : sum + m * TILE_COLUMNS;
        NAME(tile_of)(least(TILE_ROWS, bottom - top - m), packed + (top + m) / STRIP * STRIP * depth + (top + m) % STRIP, 1, STRIP, panel, depth,
                      from, kept, to + m * width, width, here);
      }
    }
  }
}
