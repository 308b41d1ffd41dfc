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
// group without rows. Either operand may have an order, as above. A task is a part of the sum of one group, for which a thread packs
// what it needs of both operands, so many rows at a time: strips [threads, DEPTH_AT_ONCE, STRIPS_AT_ONCE * STRIP], panels [threads,
// DEPTH_AT_ONCE, TILE_COLUMNS], sums [threads, STRIPS_AT_ONCE * STRIP, PANELS_AT_ONCE * TILE_COLUMNS].
void NAME(grouped_outer)(const STORED *left, const int64_t *left_order, const STORED *right, const int64_t *right_order, STORED *y,
                         const int64_t *starts, uint32_t *strips, uint32_t *panels, float *sums, int64_t groups, int64_t height,
                         int64_t width, int64_t threads) {
  enum { SUMMED_AT_ONCE = DEPTH_AT_ONCE * PER_WORD, HEIGHT_AT_ONCE = STRIPS_AT_ONCE * STRIP, WIDTH_AT_ONCE = PANELS_AT_ONCE * TILE_COLUMNS };
  int64_t down = (height + STRIP - 1) / STRIP, across = (width + TILE_COLUMNS - 1) / TILE_COLUMNS;
  int64_t parts = (down + STRIPS_AT_ONCE - 1) / STRIPS_AT_ONCE, chunks = (across + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE;
  int64_t tasks = groups * parts * chunks > 1 ? 4 * threads : threads;  // several for a thread, unless a single one is cut evenly
  while (groups * parts * chunks < tasks && parts * chunks < down * across) {
    if (chunks == across || (parts < down && height / parts > width / chunks))
      parts++;
    else
      chunks++;
  }
  int64_t largest_first[groups + 1];
  for (int64_t g = 0; g < groups; g++) {
    int64_t place = g;
    for (; place && starts[g + 1] - starts[g] > starts[largest_first[place - 1] + 1] - starts[largest_first[place - 1]]; place--)
      largest_first[place] = largest_first[place - 1];
    largest_first[place] = g;
  }
  PRAGMA(omp parallel for num_threads((int)threads) schedule(dynamic))
  for (int64_t task = 0; task < groups * parts * chunks; task++) {
    int64_t g = largest_first[task / (parts * chunks)], part = task / chunks % parts, chunk = task % chunks;
    int64_t top = down * part / parts * STRIP, bottom = least(height, down * (part + 1) / parts * STRIP);
    int64_t first = across * chunk / chunks * TILE_COLUMNS, end = least(width, across * (chunk + 1) / chunks * TILE_COLUMNS);
    uint32_t *strip = strips + this_thread() * DEPTH_AT_ONCE * HEIGHT_AT_ONCE, *panel = panels + this_thread() * DEPTH_AT_ONCE * TILE_COLUMNS;
    STORED *to = y + (g * height + top) * width;
    if (starts[g] == starts[g + 1])
      for (int64_t m = 0; m < bottom - top; m++) memset(to + m * width + first, 0, (end - first) * sizeof *to);
    for (int64_t row = starts[g]; row < starts[g + 1]; row += SUMMED_AT_ONCE) {
      int64_t summed = least(SUMMED_AT_ONCE, starts[g + 1] - row), depth = (summed + PER_WORD - 1) / PER_WORD;
      const STORED *a = left + (left_order ? 0 : row * height), *b = right + (right_order ? 0 : row * width);
      for (int64_t column = top; column < bottom; column += STRIP)
        NAME(pack_columns)(a + column, height, left_order ? left_order + row : 0, height - column, summed, strip + (column - top) * depth, STRIP);
      for (int64_t column = first; column < end; column += TILE_COLUMNS) {
        NAME(pack_columns)(b + column, width, right_order ? right_order + row : 0, width - column, summed, panel, TILE_COLUMNS);
        float *sum = sums + (this_thread() * WIDTH_AT_ONCE + column - first) * HEIGHT_AT_ONCE;
        for (int64_t m = 0; m < bottom - top; m += TILE_ROWS) {
          float *from = row > starts[g] ? sum + m * TILE_COLUMNS : 0, *kept = row + summed < starts[g + 1] ? sum + m * TILE_COLUMNS : 0;
          NAME(tile_of)(least(TILE_ROWS, bottom - top - m), strip + m / STRIP * STRIP * depth + m % STRIP, 1, STRIP, panel, depth, from, kept,
                        to + m * width + column, width, width - column);
        }
      }
    }
  }
}
