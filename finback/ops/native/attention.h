// Attention of new tokens to cached rows, for one stored type: included twice, after operations.h. What both kinds share.
//
// Every token looks at the rows of its sequence from position 0 to its own. Several tokens of one sequence may come in one
// call: the rows of all are written before any is read. A long context is cut into chunks whose number depends on its length
// alone; each chunk gives a maximum, a sum and a mixture of values, and these are put together in order. So results depend
// neither on the number of threads nor on the other sequences.

typedef struct {
  uint8_t *rows;               // [blocks, block_rows, row_bytes]
  const int32_t *blocks;       // [tokens, blocks_per_sequence]: the blocks of each; null where it has one, of its own number
  const int64_t *positions;    // [tokens]: each token's own, the last one that it looks at
  const float *cosine, *sine;  // [positions, rotated values / 2]
  int64_t tokens, width, row_bytes, blocks_per_sequence, block_rows;
  layout layout;  // of a row; plain: `width` values as they are stored
} NAME(cache);

INLINE uint8_t *NAME(cached_row)(const NAME(cache) * c, int64_t token, int64_t position) {
  int64_t block = token, within = position;
  if (c->blocks) {
    block = c->blocks[token * c->blocks_per_sequence + position / c->block_rows];
    within = position % c->block_rows;
  }
  return c->rows + (block * c->block_rows + within) * c->row_bytes;
}

// A new row of `width` values, written as the cache holds it.
static void NAME(write_row)(const NAME(cache) * c, const NAME(stored) * from, uint8_t *to) {
  float values[c->width];
  if (c->layout.format == PLAIN) {
    memcpy(to, from, c->width * sizeof *from);
    return;
  }
  for (int64_t i = 0; i < c->width; i += LANES)
    store_part_float32(values + i, LOAD_PART(from + i, c->width - i), c->width - i);
  encode_row(&c->layout, values, to);
}

// `count` codes with one scale as values, each rounded once.
INLINE void NAME(decode_tile)(const uint8_t *codes, float scale, int64_t count, int64_t format, NAME(stored) * to) {
  int64_t i = 0;
#if PAIR == 2
  for (; i + STEP <= count; i += STEP) {
    vector low = format == INT8 ? load_int8(codes + i) : load_e4m3(codes + i);
    vector high = format == INT8 ? load_int8(codes + i + LANES) : load_e4m3(codes + i + LANES);
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)(high * scale), (__m512)(low * scale)));
  }
#endif
  for (; i < count; i += LANES) STORE_PART(to + i, load_part_code(codes + i, count - i, format) * scale, count - i);
}

// Columns [first, end) of `count` rows that follow each other, as values [count, stride]: what ops/compressed.py's decode gives.
static void NAME(decode_rows)(const NAME(cache) * c, const uint8_t *row, int64_t count, range columns, NAME(stored) * to,
                              int64_t stride) {
  const layout l = c->layout;
  int64_t coded_end = least(columns.end, l.coded), first_tile = columns.first / l.tile;
  for (int64_t s = 0; s < count; s++, row += c->row_bytes, to += stride) {
    const uint8_t *scales = row + l.coded, *kept = scales + l.coded / l.tile * sizeof(float);
    int64_t column = columns.first;
    for (int64_t tile = first_tile; column < coded_end; tile++) {
      int64_t end = least(coded_end, (tile + 1) * l.tile);
      float scale;
      memcpy(&scale, scales + tile * sizeof scale, sizeof scale);
      if (l.format == INT8)
        NAME(decode_tile)(row + column, scale, end - column, INT8, to + column - columns.first);
      else
        NAME(decode_tile)(row + column, scale, end - column, E4M3, to + column - columns.first);
      column = end;
    }
    for (; column < columns.end; column += LANES) {
      int64_t left = columns.end - column;
      uint16_t part[LANES];
      memcpy(part, kept + (column - l.coded) * sizeof *part, least(LANES, left) * sizeof *part);
      STORE_PART(to + column - columns.first, load_part_bfloat16(part, left), left);
    }
  }
}

// Queries of some heads to keys and values of fewer: `heads / key_heads` neighbours share a key head. Key head i lies at
// i * key_size of a row, its values at first_value + i * value_size.
typedef struct {
  NAME(cache) cache;
  int64_t heads, key_heads, key_size, value_size, first_value;
  float scale;
  const NAME(packed) * queries;  // [heads, tokens, key_size filled up]
  NAME(stored) * output;         // [tokens, heads, value_size]
  NAME(packed) * packed_output;  // or, unless that is null, here: [heads, tokens, value_size filled up]
  float *values;                 // of each member, [heads, value_size]
  NAME(stored) * decoded;        // of each member, [PIECE, stride]: of compressed rows
  int64_t stride;                // between values of one row and those of the next
  int64_t most_chunks;
  float *highest, *sum, *parts;  // what is kept of chunks: [tokens, heads, most_chunks], twice, and values of each
} NAME(attention);

// Positions that are looked at together, so that their rows are in the nearest cache when all heads have looked.
enum { NAME(CHUNK) = 256, NAME(MOST_CHUNKS) = 16, NAME(PIECE) = 32 };

INLINE int64_t NAME(chunks)(const NAME(cache) * c, int64_t token) {
  return least(NAME(MOST_CHUNKS), (c->positions[token] + NAME(CHUNK)) / NAME(CHUNK));
}

// What it costs to look at one chunk, as a number of positions.
INLINE int64_t NAME(chunk_cost)(const NAME(cache) * c, int64_t token) {
  return c->positions[token] / NAME(chunks)(c, token) + 1;
}

// A piece lies in one block.
INLINE int64_t NAME(end_of_piece)(const NAME(cache) * c, int64_t start, int64_t end) {
  end = least(end, start + NAME(PIECE));
  return c->blocks ? least(end, (start / c->block_rows + 1) * c->block_rows) : end;
}

// Memory for all but queries and packed output.
static void NAME(take_attention)(NAME(attention) * a, int64_t threads, arena *memory) {
  const NAME(cache) *c = &a->cache;
  a->values = take(memory, threads * a->heads * a->value_size * sizeof(float));
  a->stride = c->width;
  if (c->layout.format != PLAIN) {
    a->stride = rounded_up(most(a->key_size, a->value_size), STEP);
    a->decoded = take(memory, threads * NAME(PIECE) * a->stride * sizeof *a->decoded);
  }
  a->most_chunks = 1;
  for (int64_t t = 0; t < c->tokens; t++) a->most_chunks = most(a->most_chunks, NAME(chunks)(c, t));
  if (a->most_chunks == 1) return;
  int64_t count = c->tokens * a->heads * a->most_chunks;
  a->highest = take(memory, count * sizeof(float));
  a->sum = take(memory, count * sizeof(float));
  a->parts = take(memory, count * a->value_size * sizeof(float));
}

// Up to PANEL heads that share keys and values, and what they have seen so far: the values of head h are the sum over
// positions of e^(score - highest[h]) value, and sum[h] that of the factors.
typedef struct {
  int64_t head, heads, key, value;
  float *values, highest[PANEL], sum[PANEL];
} NAME(unit);

// Part `index` of `count` of some rows, which lie one after the other.
INLINE void NAME(prefetch)(const NAME(cache) * c, const uint8_t *rows, int64_t number, int64_t index, int64_t count) {
  range mine = share(number * c->row_bytes, 64, (member){index, count});
  for (int64_t i = mine.first; i < mine.end; i += 64) __builtin_prefetch(rows + i);
}

// Some columns of a piece's rows, `stride` apart: where they lie, or decoded, unless `held` says that they are already.
INLINE const NAME(stored) * NAME(values_of)(const NAME(attention) * a, const uint8_t *rows, int64_t count, range columns,
                                           NAME(stored) * decoded, range *held) {
  if (a->cache.layout.format == PLAIN) return (const NAME(stored) *)rows + columns.first;
  if (columns.first < held->first || columns.end > held->end) {
    NAME(decode_rows)(&a->cache, rows, count, columns, decoded, a->stride);
    *held = columns;
  }
  return decoded + columns.first - held->first;
}

// Scores [heads, PIECE] of a piece -> weights e^(score - highest), after `factor` has said by what earlier ones are to shrink.
INLINE void NAME(weigh)(NAME(unit) * u, float *scores, int64_t count, float scale, float *factor, NAME(packed) * weights) {
  float highest[PANEL] = {0};
  for (int64_t h = 0; h < u->heads; h++) {
    float *score = scores + h * NAME(PIECE);
    for (int64_t s = count; s < rounded_up(count, LANES); s++) score[s] = -INFINITY;
    vector largest = load_float32(score);
    for (int64_t s = LANES; s < count; s += LANES) largest = larger(load_float32(score + s), largest);
    highest[h] = largest_lane(largest);
  }
  for (int64_t h = 0; h < u->heads; h += LANES) {  // of many heads at once, and without a branch that nobody can foresee
    vector before = load_float32(u->highest + h), now = larger(load_float32(highest + h), before);
    store_float32(u->highest + h, now);
    store_float32(factor + h, exponential((before - now) * scale));
  }
  for (int64_t h = 0; h < u->heads; h++) {
    vector sum = {0};
    for (int64_t s = 0; s < count; s += LANES) {
      vector weight = exponential((load_float32(scores + h * NAME(PIECE) + s) - u->highest[h]) * scale);
      STORE_PACKED(weights + h * NAME(PIECE) + s, weight);
      sum += weight;
    }
    u->sum[h] = u->sum[h] * factor[h] + sum_of_lanes(sum);
  }
}

// Some units look at some positions of one token's sequence, piece by piece; while one piece is worked on, the next is fetched.
// Each piece is summed apart: one long sum would lose bits.
static void NAME(attend)(const NAME(attention) * a, int64_t token, range positions, NAME(unit) * units, int64_t count,
                         NAME(stored) * decoded) {
  const NAME(cache) *c = &a->cache;
  int64_t padded = rounded_up(a->key_size, STEP);
  float scores[count][PANEL * NAME(PIECE)], factor[PANEL];
  NAME(packed) weights[PANEL * NAME(PIECE)];
  for (int64_t start = positions.first, end; start < positions.end; start = end) {
    end = NAME(end_of_piece)(c, start, positions.end);
    const uint8_t *rows = NAME(cached_row)(c, token, start);
    range held = {0, 0};
    // The next piece is of this context, or, where it ends, probably the first of the next token's.
    int64_t next_token = end <= c->positions[token] ? token : least(token + 1, c->tokens - 1);
    int64_t next_start = end <= c->positions[token] ? end : 0;
    int64_t next_count = NAME(end_of_piece)(c, next_start, c->positions[next_token] + 1) - next_start;
    const uint8_t *next = NAME(cached_row)(c, next_token, next_start);
    for (int64_t i = 0; i < count; i++) {
      NAME(unit) *u = units + i;
      const NAME(packed) * queries[PANEL];
      for (int64_t h = 0; h < u->heads; h++) queries[h] = a->queries + ((u->head + h) * c->tokens + token) * padded;
      NAME(prefetch)(c, next, next_count, i, 2 * count);
      const NAME(stored) *keys =
          NAME(values_of)(a, rows, end - start, (range){u->key, u->key + a->key_size}, decoded, &held);
      NAME(all_dots)(keys, a->stride, queries, a->key_size, 0, end - start, u->heads, scores[i], NAME(PIECE));
    }
    for (int64_t i = 0; i < count; i++) {
      NAME(unit) *u = units + i;
      NAME(prefetch)(c, next, next_count, count + i, 2 * count);
      NAME(weigh)(u, scores[i], end - start, a->scale, factor, weights);
      const NAME(stored) *values =
          NAME(values_of)(a, rows, end - start, (range){u->value, u->value + a->value_size}, decoded, &held);
      NAME(mix)(values, a->stride, end - start, a->value_size, weights, NAME(PIECE), factor, u->heads, u->values,
                a->value_size);
    }
  }
}

INLINE void NAME(pack_values)(NAME(packed) * to, const float *from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) STORE_PACKED_PART(to + i, load_part_float32(from + i, count - i), count - i);
}

// The mixture of values of one head, complete but for the division by the sum of its factors.
static void NAME(finish_head)(const NAME(attention) * a, int64_t token, int64_t head, float *values, float sum) {
  for (int64_t v = 0; v < a->value_size; v++) values[v] /= sum;
  if (!a->packed_output) {
    NAME(store_all)(a->output + (token * a->heads + head) * a->value_size, values, a->value_size);
    return;
  }
  int64_t padded = rounded_up(a->value_size, STEP);
  NAME(packed) *to = a->packed_output + (head * a->cache.tokens + token) * padded;
  memset(to + a->value_size, 0, (padded - a->value_size) * sizeof *to);
  NAME(pack_values)(to, values, a->value_size);
}

static void NAME(attend_chunk)(const NAME(attention) * a, int64_t token, int64_t chunk, NAME(unit) * units, int64_t count,
                               float *values, NAME(stored) * decoded) {
  int64_t chunks = NAME(chunks)(&a->cache, token), size = a->value_size;
  memset(values, 0, a->heads * size * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    units[i].values = values + (units[i].head - units->head) * size;
    for (int64_t h = 0; h < PANEL; h++) units[i].highest[h] = -INFINITY, units[i].sum[h] = 0;
  }
  NAME(attend)(a, token, share(a->cache.positions[token] + 1, NAME(PIECE), (member){chunk, chunks}), units, count, decoded);
  for (int64_t i = 0; i < count; i++)
    for (int64_t h = 0; h < units[i].heads; h++) {
      float *of_head = units[i].values + h * size;
      if (chunks == 1) {
        NAME(finish_head)(a, token, units[i].head + h, of_head, units[i].sum[h]);
        continue;
      }
      int64_t at = (token * a->heads + units[i].head + h) * a->most_chunks + chunk;
      a->highest[at] = units[i].highest[h];
      a->sum[at] = units[i].sum[h];
      memcpy(a->parts + at * size, of_head, size * sizeof(float));
    }
}

// One head of one token from its chunks, in their order.
static void NAME(merge_chunks)(const NAME(attention) * a, int64_t token, int64_t head, float *values) {
  int64_t first = (token * a->heads + head) * a->most_chunks, end = first + NAME(chunks)(&a->cache, token);
  float highest = a->highest[first], sum = 0;
  for (int64_t i = first + 1; i < end; i++) highest = a->highest[i] > highest ? a->highest[i] : highest;
  memset(values, 0, a->value_size * sizeof(float));
  for (int64_t i = first; i < end; i++) {
    float factor = exponential(splat((a->highest[i] - highest) * a->scale))[0];
    sum += a->sum[i] * factor;
    for (int64_t v = 0; v < a->value_size; v++) values[v] += a->parts[i * a->value_size + v] * factor;
  }
  NAME(finish_head)(a, token, head, values, sum);
}

// All tokens, heads and chunks, shared out among the team. Where these are many, all heads look together, so that rows are
// read once and as they lie; where they are few, heads are shared out too.
static void NAME(attend_all)(const NAME(attention) * a, member m) {
  enum { ITEMS = 4 };  // for each member, at least, if there are that many
  const NAME(cache) *c = &a->cache;
  int64_t all_chunks = 0, total = 0, at = 0, group = a->heads / a->key_heads;
  for (int64_t t = 0; t < c->tokens; t++) all_chunks += NAME(chunks)(c, t);
  int64_t heads = least(least(PANEL, group), most(1, a->heads * all_chunks / m.count));
  int64_t per_key_head = (group + heads - 1) / heads, count = per_key_head * a->key_heads;
  NAME(unit) units[count];
  for (int64_t i = 0; i < count; i++) {
    int64_t key_head = i / per_key_head, first = i % per_key_head * heads;
    units[i].head = key_head * group + first;
    units[i].heads = least(heads, group - first);
    units[i].key = key_head * a->key_size;
    units[i].value = a->first_value + key_head * a->value_size;
  }
  int64_t together = most(1, least(count, count * all_chunks / (ITEMS * m.count)));
  int64_t sets = (count + together - 1) / together;
  float *values = a->values + m.index * a->heads * a->value_size;
  NAME(stored) *decoded = a->decoded + m.index * NAME(PIECE) * a->stride;
  for (int64_t t = 0; t < c->tokens; t++) total += sets * NAME(chunks)(c, t) * NAME(chunk_cost)(c, t);
  range mine = share(total, 1, m);
  for (int64_t t = 0; t < c->tokens; t++) {
    int64_t items = sets * NAME(chunks)(c, t), cost = NAME(chunk_cost)(c, t);
    range of_token = items_within(mine, at, items, cost);
    for (int64_t i = of_token.first; i < of_token.end; i++) {
      int64_t first = i % sets * together;
      NAME(attend_chunk)(a, t, i / sets, units + first, least(together, count - first), values, decoded);
    }
    at += items * cost;
  }
  if (a->most_chunks == 1) return;
  wait_for_team();
  mine = share(c->tokens * a->heads, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++)
    if (NAME(chunks)(c, i / a->heads) > 1) NAME(merge_chunks)(a, i / a->heads, i % a->heads, values);
}
