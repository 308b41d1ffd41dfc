// The products of grouped.c for one stored type.

// y [M, columns]: rows starts[g] to starts[g + 1] of x [M, K] times the matrix of group g, with K in words: `depth`. With `order` [M],
// row m of x is x[order[m]]. Matrices are [groups, columns, K] (`turned`), or [groups, K, columns]. panels [threads, depth, TILE_COLUMNS].
void NAME(grouped_product)(const uint32_t *x, const int64_t *order, const STORED *w, STORED *y, const int64_t *starts,
                           uint32_t *panels, int64_t groups, int64_t depth, int64_t columns, int64_t turned, int64_t threads) {
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
      NAME(pack_columns)(matrix + column, columns, 0, here, depth * PER_WORD, panel, TILE_COLUMNS);
    for (; row < end; row += TILE_ROWS) {
      int64_t rows = least(TILE_ROWS, end - row);
      const uint32_t *at[TILE_ROWS];
      for (int64_t m = 0; m < TILE_ROWS; m++) {
        int64_t from = row + least(m, rows - 1);
        at[m] = x + (order ? order[from] : from) * depth;
      }
      NAME(tile_of_rows)(rows, at, 1, panel, depth, 0, 0, y + row * columns + column, columns, here);
    }
  }
}

// For each group the sum over its rows of left_i right_i^T: left [M, height], right [M, width] -> y [groups, height, width], 0 for a
// group without rows. Either operand may have an order, as above. `strips` has room for as many words as all groups have in depth times ceil(height / STRIP) * STRIP;
// panels [threads, DEPTH_AT_ONCE, TILE_COLUMNS], sums [threads, ROWS_AT_ONCE, TILE_COLUMNS].
void NAME(grouped_outer)(const STORED *left, const int64_t *left_order, const STORED *right, const int64_t *right_order, STORED *y,
                         const int64_t *starts, uint32_t *strips, uint32_t *panels, float *sums, int64_t groups, int64_t height,
                         int64_t width, int64_t threads) {
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
    const STORED *from = left + column + (left_order ? 0 : row * height);
    NAME(pack_columns)(from, height, left_order ? left_order + row : 0, height - column, summed, to, STRIP);
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
      const STORED *rows = right + column + (right_order ? 0 : row * width);
      NAME(pack_columns)(rows, width, right_order ? right_order + row : 0, here, summed, panel, TILE_COLUMNS);
      for (int64_t m = 0; m < bottom - top; m += TILE_ROWS) {
        const float *from = block ? sum + m * TILE_COLUMNS : 0;
        float *kept = last ? 0 : sum + m * TILE_COLUMNS;
        NAME(tile_of)(least(TILE_ROWS, bottom - top - m), packed + (top + m) / STRIP * STRIP * depth + (top + m) % STRIP, 1, STRIP, panel, depth,
                      from, kept, to + m * width, width, here);
      }
    }
  }
}
