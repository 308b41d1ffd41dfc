// Attention of new tokens to cached rows, for one stored type: included twice, after rows.h. What both kinds share.
//
// Every token looks at the rows of its sequence from position 0 to its own. Several tokens of one sequence may come in one
// call: the rows of all are written before any is read. A long context is cut into chunks whose number depends on its length
// alone; each chunk gives a maximum, a sum and a mixture of values, and these are put together in order. So results depend
// neither on the number of threads nor on the other sequences.

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
  NAME(stored) * opened;         // all rows of sequences with many new tokens, decoded: [positions, width] of each
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

// New tokens of one sequence from which on its compressed rows are decoded once, for all of them.
enum { NAME(OPENED) = 4 };

// The first token behind `first` that does not continue its sequence.
static int64_t NAME(end_of_sequence)(const NAME(cache) * c, int64_t first) {
  int64_t end = first + 1;
  while (c->blocks && end < c->tokens && c->positions[end] == c->positions[end - 1] + 1) {
    const int32_t *before = c->blocks + (end - 1) * c->blocks_per_sequence, *blocks = before + c->blocks_per_sequence;
    if (memcmp(before, blocks, (c->positions[end - 1] / c->block_rows + 1) * sizeof *blocks)) break;
    end++;
  }
  return end;
}

// Memory for all but queries and packed output.
static void NAME(take_attention)(NAME(attention) * a, int64_t threads, arena *memory) {
  const NAME(cache) *c = &a->cache;
  a->values = take(memory, threads * a->heads * a->value_size * sizeof(float));
  a->stride = c->width;
  if (c->layout.format != PLAIN) {
    a->stride = rounded_up(most(a->key_size, a->value_size), STEP);
    a->decoded = take(memory, threads * NAME(PIECE) * a->stride * sizeof *a->decoded);
    int64_t rows = 0;
    for (int64_t first = 0, end; first < c->tokens; first = end) {
      end = NAME(end_of_sequence)(c, first);
      if (end - first >= NAME(OPENED)) rows += c->positions[end - 1] + 1;
    }
    a->opened = take(memory, rows * c->width * sizeof *a->opened);
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

// Part `index` of `count` of some rows, which lie one after the other: into the second-level cache, for the first could neither hold
// them nor have so many requests open.
INLINE void NAME(prefetch)(const NAME(cache) * c, const uint8_t *rows, int64_t number, int64_t index, int64_t count) {
  range mine = share(number * c->row_bytes, 64, (member){index, count});
  for (int64_t i = mine.first; i < mine.end; i += 64) __builtin_prefetch(rows + i, 0, 2);
}

// Decode all rows of the sequences that are to be opened, the team sharing the work; of_token[t] is where those of token t lie, or
// null.
static void NAME(open)(const NAME(attention) * a, member m, const NAME(stored) * *of_token) {
  const NAME(cache) *c = &a->cache;
  NAME(stored) *next = a->opened;
  for (int64_t first = 0, end; first < c->tokens; first = end) {
    end = NAME(end_of_sequence)(c, first);
    int64_t rows = end - first >= NAME(OPENED) ? c->positions[end - 1] + 1 : 0;
    for (int64_t t = first; t < end; t++) of_token[t] = rows ? next : 0;
    range mine = share(rows, NAME(PIECE), m);
    for (int64_t start = mine.first, stop; start < mine.end; start = stop) {
      stop = NAME(end_of_piece)(c, start, mine.end);
      NAME(decode_rows)(c, NAME(cached_row)(c, end - 1, start), stop - start, (range){0, c->width}, next + start * c->width,
                        c->width);
    }
    next += rows * c->width;
  }
  wait_for_team();
}

// Some columns of a piece's rows, `stride` apart: where they lie, or decoded, unless `held` says that they are already.
INLINE const NAME(stored) * NAME(values_of)(const NAME(attention) * a, const uint8_t *rows, int plain, int64_t count,
                                           range columns, NAME(stored) * decoded, range *held) {
  if (plain) return (const NAME(stored) *)rows + columns.first;
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
                         NAME(stored) * decoded, const NAME(stored) * opened) {
  const NAME(cache) *c = &a->cache;
  int plain = opened || c->layout.format == PLAIN;
  int64_t stride = opened ? c->width : a->stride;
  int64_t padded = rounded_up(a->key_size, STEP);
  float scores[count][PANEL * NAME(PIECE)], factor[PANEL];
  NAME(packed) weights[PANEL * NAME(PIECE)];
  for (int64_t start = positions.first, end; start < positions.end; start = end) {
    end = NAME(end_of_piece)(c, start, positions.end);
    const uint8_t *rows = opened ? (const uint8_t *)(opened + start * c->width) : NAME(cached_row)(c, token, start);
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
      if (!opened) NAME(prefetch)(c, next, next_count, i, 2 * count);
      const NAME(stored) *keys =
          NAME(values_of)(a, rows, plain, end - start, (range){u->key, u->key + a->key_size}, decoded, &held);
      NAME(all_dots)(keys, stride, queries, a->key_size, NO_FETCH, end - start, u->heads, scores[i], NAME(PIECE));
    }
    for (int64_t i = 0; i < count; i++) {
      NAME(unit) *u = units + i;
      if (!opened) NAME(prefetch)(c, next, next_count, count + i, 2 * count);
      NAME(weigh)(u, scores[i], end - start, a->scale, factor, weights);
      const NAME(stored) *values =
          NAME(values_of)(a, rows, plain, end - start, (range){u->value, u->value + a->value_size}, decoded, &held);
      NAME(mix)(values, stride, end - start, a->value_size, weights, NAME(PIECE), factor, u->heads, u->values,
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
                               float *values, NAME(stored) * decoded, const NAME(stored) * opened) {
  int64_t chunks = NAME(chunks)(&a->cache, token), size = a->value_size;
  memset(values, 0, a->heads * size * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    units[i].values = values + (units[i].head - units->head) * size;
    for (int64_t h = 0; h < PANEL; h++) units[i].highest[h] = -INFINITY, units[i].sum[h] = 0;
  }
  NAME(attend)(a, token, share(a->cache.positions[token] + 1, NAME(PIECE), (member){chunk, chunks}), units, count, decoded,
               opened);
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
  const NAME(stored) * opened[c->tokens];
  if (c->layout.format == PLAIN)
    memset(opened, 0, sizeof opened);
  else
    NAME(open)(a, m, opened);
  for (int64_t t = 0; t < c->tokens; t++) total += sets * NAME(chunks)(c, t) * NAME(chunk_cost)(c, t);
  range mine = share(total, 1, m);
  for (int64_t t = 0; t < c->tokens; t++) {
    int64_t items = sets * NAME(chunks)(c, t), cost = NAME(chunk_cost)(c, t);
    range of_token = items_within(mine, at, items, cost);
    for (int64_t i = of_token.first; i < of_token.end; i++) {
      int64_t first = i % sets * together;
      NAME(attend_chunk)(a, t, i / sets, units + first, least(together, count - first), values, decoded, opened[t]);
    }
    at += items * cost;
  }
  if (a->most_chunks == 1) return;
  wait_for_team();
  mine = share(c->tokens * a->heads, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++)
    if (NAME(chunks)(c, i / a->heads) > 1) NAME(merge_chunks)(a, i / a->heads, i % a->heads, values);
}
