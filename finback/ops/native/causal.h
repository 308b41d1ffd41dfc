// Causal attention of causal.c for one stored type.

#if BF16 && defined(__AVX512BF16__)
INLINE words NAME(rounded_word)(vector value) {
  return (words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value));
}
#elif BF16
INLINE words NAME(rounded_word)(vector value) { return bfloat16_words(value); }
#endif

// ---- operands

// Rows [tokens, size], `stride` apart, as the columns of panels: to [tokens / TILE_COLUMNS, size, TILE_COLUMNS] in words.
static void NAME(rows_as_columns)(const STORED *from, int64_t stride, int64_t tokens, int64_t size, uint32_t *to) {
  int64_t depth = size / PER_WORD;
  for (int64_t at = 0; at < tokens; at += TILE_COLUMNS)
    NAME(pack_rows)((const uint32_t *)(from + at * stride), stride / PER_WORD, tokens - at, depth, to + at * depth);
}

// The same rows as the rows of panels, which are summed over: to [size / TILE_COLUMNS, tokens, TILE_COLUMNS] in words.
static void NAME(rows_as_rows)(const STORED *from, int64_t stride, int64_t tokens, int64_t size, uint32_t *to) {
  int64_t depth = (tokens + PER_WORD - 1) / PER_WORD;
  for (int64_t at = 0; at < size; at += TILE_COLUMNS)
    NAME(pack_columns)(from + at, stride, 0, size - at, tokens, to + at * depth, TILE_COLUMNS);
}

// Products of up to TILE_ROWS rows with the first `seen` rows that were packed as columns, in whole vectors: float32
// [seen / TILE_COLUMNS, TILE_ROWS, TILE_COLUMNS].
INLINE void NAME(strip)(int64_t rows, const STORED *a, int64_t stride, const uint32_t *columns, int64_t size, int64_t seen, float *to) {
  int64_t depth = size / PER_WORD;
  for (int64_t at = 0; at < seen; at += TILE_COLUMNS)
    NAME(tile_of)(rows, (const uint32_t *)a, stride / PER_WORD, 1, columns + at * depth, depth, 0, to + at * TILE_ROWS, 0, 0,
                  rounded_up(least(TILE_COLUMNS, seen - at), LANES));
}

// Where vector i of row m lies in such a strip.
#define IN_STRIP(i, m) ((i) / TILE_COLUMNS * (TILE_ROWS * TILE_COLUMNS) + (m) * TILE_COLUMNS + (i) % TILE_COLUMNS)

// ---- softmax

// The `seen` scores of row m become exponentials of their scaled distance from the largest; returns one over their sum. Behind them
// are zeros up to the end of their vector.
INLINE float NAME(exponentials)(float *strip, int64_t m, int64_t seen, float scale) {
  int64_t whole = seen / LANES * LANES;
  vector top = splat(-INFINITY), sum = splat(0), last = splat(0);
  for (int64_t i = 0; i < whole; i += LANES) top = larger(load_float32(strip + IN_STRIP(i, m)) * scale, top);
  if (whole < seen) {
    last = first_lanes(load_float32(strip + IN_STRIP(whole, m)) * scale, seen - whole, -INFINITY);
    top = larger(last, top);
  }
  vector greatest = splat(largest_lane(top));
  for (int64_t i = 0; i < whole; i += LANES) {
    vector term = exponential(load_float32(strip + IN_STRIP(i, m)) * scale - greatest);
    store_float32(strip + IN_STRIP(i, m), term);
    sum += term;
  }
  if (whole < seen) {
    vector term = exponential(last - greatest);
    store_float32(strip + IN_STRIP(whole, m), term);
    sum += term;
  }
  return 1.0f / sum_of_lanes(sum);
}

// ---- forward

// output = softmax(scale q k^T) v, causal: q [batch, heads, tokens, size], k [batch, heads / shared, keys, size],
// v [batch, heads / shared, keys, width], output [batch, heads, tokens, width]; strides of q, k, v and output, in this order. `spans`
// [batch] tells how many queries and keys there are: behind them nothing is read, and nothing written.
// A task is `block` queries, a multiple of TILE_ROWS, of the heads that share keys. scratch [threads, room], of
// rounded_up(keys, TILE_COLUMNS) * (size + rounded_up(width, TILE_COLUMNS) + 2 * TILE_ROWS) words at least.
void NAME(causal_attention)(const STORED *q, const STORED *k, const STORED *v, STORED *output, uint32_t *scratch, const strides *of,
                            const span *spans, int64_t batch, int64_t heads, int64_t shared, int64_t tokens, int64_t keys_most,
                            int64_t size, int64_t width, int64_t block, int64_t room, int64_t threads, float scale) {
  int64_t groups = heads / shared, blocks = (tokens + block - 1) / block, padded = rounded_up(keys_most, TILE_COLUMNS);
  PRAGMA(omp parallel for num_threads((int)threads) schedule(dynamic))
  for (int64_t task = 0; task < batch * groups * blocks; task++) {
    int64_t n = task / (groups * blocks), group = task / blocks % groups;
    int64_t start = (blocks - 1 - task % blocks) * block, end = least(spans[n].tokens, start + block);  // the longest first
    int64_t past = spans[n].past, last = past + end;
    if (start >= end) continue;
    uint32_t *keys = scratch + this_thread() * room, *values = keys + padded * size;
    float *scores = (float *)(values + padded * rounded_up(width, TILE_COLUMNS));
    STORED *weights = (STORED *)(scores + padded * TILE_ROWS);
    NAME(rows_as_columns)(k + n * of[1].batch + group * of[1].head, of[1].token, last, size, keys);
    NAME(rows_as_rows)(v + n * of[2].batch + group * of[2].head, of[2].token, last, width, values);
    int64_t depth = (last + PER_WORD - 1) / PER_WORD;
    for (int64_t head = group * shared; head < (group + 1) * shared; head++) {
      const STORED *query = q + n * of[0].batch + head * of[0].head;
      STORED *to = output + n * of[3].batch + head * of[3].head;
      for (int64_t row = start; row < end; row += TILE_ROWS) {
        int64_t rows = least(TILE_ROWS, end - row), seen = past + row + rows;
        NAME(strip)(rows, query + row * of[0].token, of[0].token, keys, size, seen, scores);
        for (int64_t m = 0; m < rows; m++) {
          float inverse = NAME(exponentials)(scores, m, past + row + m + 1, scale);
          int64_t i = 0;
          for (; i <= past + row + m; i += LANES)
            NAME(store_sum)(weights + m * padded + i, load_float32(scores + IN_STRIP(i, m)) * inverse, LANES);
          for (; i < seen; i += LANES) NAME(store_sum)(weights + m * padded + i, splat(0), LANES);
        }
        for (int64_t at = 0; at < width; at += TILE_COLUMNS)
          NAME(tile_of)(rows, (const uint32_t *)weights, padded / PER_WORD, 1, values + at * depth, (seen + PER_WORD - 1) / PER_WORD,
                        0, 0, to + row * of[3].token + at, of[3].token, width - at);
      }
    }
  }
}

// ---- gradients

// What two neighbouring queries have for the same keys, as the halves of words; in float32 a word is the first one's alone.
INLINE void NAME(store_pair)(uint32_t *to, vector first, vector second) {
#if BF16
  words pair = NAME(rounded_word)(first) | NAME(rounded_word)(second) << 16;
#else
  words pair = (words)first;
  (void)second;
#endif
  memcpy(to, &pair, sizeof pair);
}

// The sums over a block of queries, which are tokens `start` to `end`, go to the gradients of keys, or of values: of each row [end, size]
// (float32, in panels of TILE_COLUMNS columns and `keys` rows) with the queries from its own on. `pairs` [queries, padded] in words,
// `operand` the queries, or the gradients of the output, packed as rows.
INLINE void NAME(sum_over_queries)(const uint32_t *pairs, int64_t padded, const uint32_t *operand, int64_t start, int64_t end,
                                   int64_t size, int64_t keys, float *sums) {
  int64_t depth = (end - start + PER_WORD - 1) / PER_WORD;
  for (int64_t at = 0; at < size; at += TILE_COLUMNS)
    for (int64_t row = 0, next; row < end; row = next) {
      next = row < start % TILE_ROWS ? start % TILE_ROWS : row + TILE_ROWS;  // a tile of keys begins where one of queries does
      int64_t skipped = most(0, row - start) / PER_WORD;  // queries that come before these keys
      float *sum = sums + at * keys + row * TILE_COLUMNS;
      NAME(tile_of)(least(next, end) - row, pairs + skipped * padded + row, 1, padded, operand + at * depth + skipped * TILE_COLUMNS,
                    depth - skipped, sum, sum, 0, 0, size - at);
    }
}

INLINE void NAME(store_sums)(const float *sums, int64_t keys, int64_t size, STORED *to, int64_t stride) {
  for (int64_t row = 0; row < keys; row++)
    for (int64_t at = 0; at < size; at += LANES) {
      int64_t panel = at / TILE_COLUMNS * TILE_COLUMNS, place = panel * keys + row * TILE_COLUMNS + (at - panel);
      NAME(store_sum)(to + row * stride + at, load_float32(sums + place), size - at);
    }
}

// The gradients of q, k and v from that of the output, all as above; strides of q, k, v, grad, grad_q, grad_k and grad_v.
// A task is the heads that share keys. scratch [threads, room] of words, as many as causal.py counts.
void NAME(causal_attention_backward)(const STORED *q, const STORED *k, const STORED *v, const STORED *grad, STORED *grad_q,
                                     STORED *grad_k, STORED *grad_v, uint32_t *scratch, const strides *of, const span *spans,
                                     int64_t batch, int64_t heads, int64_t shared, int64_t keys_most, int64_t size, int64_t width,
                                     int64_t room, int64_t threads, float scale) {
  int64_t groups = heads / shared, padded = rounded_up(keys_most, TILE_COLUMNS), wide = rounded_up(size, TILE_COLUMNS);
  int64_t wide_values = rounded_up(width, TILE_COLUMNS);
  PRAGMA(omp parallel for num_threads((int)threads) schedule(dynamic))
  for (int64_t task = 0; task < batch * groups; task++) {
    int64_t n = task / groups, group = task % groups, past = spans[n].past, tokens = spans[n].tokens, all = past + tokens;
    int64_t depth = (all + PER_WORD - 1) / PER_WORD;
    const STORED *key = k + n * of[1].batch + group * of[1].head, *value = v + n * of[2].batch + group * of[2].head;
    uint32_t *keys = scratch + this_thread() * room, *key_rows = keys + padded * size, *values = key_rows + padded * wide;
    float *sums_k = (float *)(values + padded * width), *sums_v = sums_k + padded * wide;
    float *scores = sums_v + padded * wide_values, *changes = scores + padded * TILE_ROWS;
    uint32_t *queries = (uint32_t *)(changes + padded * TILE_ROWS), *grads = queries + QUERIES_AT_ONCE * wide;
    uint32_t *weights = grads + QUERIES_AT_ONCE * wide_values, *score_grads = weights + QUERIES_AT_ONCE * padded;
    STORED *rounded = (STORED *)(score_grads + QUERIES_AT_ONCE * padded);
    NAME(rows_as_columns)(key, of[1].token, all, size, keys);
    NAME(rows_as_rows)(key, of[1].token, all, size, key_rows);
    NAME(rows_as_columns)(value, of[2].token, all, width, values);
    memset(sums_k, 0, all * wide * sizeof *sums_k);
    memset(sums_v, 0, all * wide_values * sizeof *sums_v);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++) {
      const STORED *query = q + n * of[0].batch + head * of[0].head, *of_output = grad + n * of[3].batch + head * of[3].head;
      STORED *to = grad_q + n * of[4].batch + head * of[4].head;
      for (int64_t start = 0; start < tokens; start += QUERIES_AT_ONCE) {
        int64_t end = least(tokens, start + QUERIES_AT_ONCE);
        NAME(rows_as_rows)(query + start * of[0].token, of[0].token, end - start, size, queries);
        NAME(rows_as_rows)(of_output + start * of[3].token, of[3].token, end - start, width, grads);
        for (int64_t row = start; row < end; row += TILE_ROWS) {
          int64_t rows = least(TILE_ROWS, end - row), seen = past + row + rows;
          NAME(strip)(rows, query + row * of[0].token, of[0].token, keys, size, seen, scores);
          NAME(strip)(rows, of_output + row * of[3].token, of[3].token, values, width, seen, changes);
          for (int64_t m = 0; m < TILE_ROWS; m++) {
            int64_t i = 0;
            if (m < rows) {
              vector inverse = splat(NAME(exponentials)(scores, m, past + row + m + 1, scale)), sum = splat(0);
              for (; i <= past + row + m; i += LANES) {
                vector weight = load_float32(scores + IN_STRIP(i, m)) * inverse;
                store_float32(scores + IN_STRIP(i, m), weight);
                // What later keys changed is cleared, not multiplied by a weight of 0: it may be nan.
                vector change = first_lanes(load_float32(changes + IN_STRIP(i, m)), past + row + m + 1 - i, 0);
                store_float32(changes + IN_STRIP(i, m), change);
                sum += weight * change;
              }
              vector mean = splat(sum_of_lanes(sum));
              for (i = 0; i <= past + row + m; i += LANES) {
                vector change = load_float32(changes + IN_STRIP(i, m)) - mean;
                store_float32(changes + IN_STRIP(i, m), load_float32(scores + IN_STRIP(i, m)) * change * scale);
              }
            }
            for (; i < seen; i += LANES) {
              store_float32(scores + IN_STRIP(i, m), splat(0));
              store_float32(changes + IN_STRIP(i, m), splat(0));
            }
          }
          for (int64_t m = 0; m < TILE_ROWS; m += PER_WORD) {
            int64_t pair = (row - start + m) / PER_WORD * padded;
            for (int64_t i = 0; i < seen; i += LANES) {
              int64_t next = PER_WORD - 1;
              NAME(store_pair)(weights + pair + i, load_float32(scores + IN_STRIP(i, m)), load_float32(scores + IN_STRIP(i, m + next)));
              NAME(store_pair)(score_grads + pair + i, load_float32(changes + IN_STRIP(i, m)), load_float32(changes + IN_STRIP(i, m + next)));
            }
          }
          for (int64_t m = 0; m < rows; m++)
            for (int64_t i = 0; i < seen; i += LANES)
              NAME(store_sum)(rounded + m * padded + i, load_float32(changes + IN_STRIP(i, m)), LANES);
          for (int64_t at = 0; at < size; at += TILE_COLUMNS)
            NAME(tile_of)(rows, (const uint32_t *)rounded, padded / PER_WORD, 1, key_rows + at * depth, (seen + PER_WORD - 1) / PER_WORD,
                          0, 0, to + row * of[4].token + at, of[4].token, size - at);
        }
        NAME(sum_over_queries)(weights, padded, grads, past + start, past + end, width, all, sums_v);
        NAME(sum_over_queries)(score_grads, padded, queries, past + start, past + end, size, all, sums_k);
      }
    }
    NAME(store_sums)(sums_k, all, size, grad_k + n * of[5].batch + group * of[5].head, of[5].token);
    NAME(store_sums)(sums_v, all, width, grad_v + n * of[6].batch + group * of[6].head, of[6].token);
  }
}
