// Attention of new tokens to cached rows, for one stored type: included twice, after operations.h.
//
// Every token looks at the rows of its sequence from position 0 to its own. Several tokens of one sequence may come in one
// call: the rows of all are written before any is read. A long context is cut into chunks whose number depends on its length
// alone; each chunk gives a maximum, a sum and a mixture of values, and these are put together in order. So results depend
// neither on the number of threads nor on the other sequences.

typedef struct {
  NAME(stored) * rows;         // [blocks, block_rows, width]
  const int32_t *blocks;       // [tokens, blocks_per_sequence]: the blocks of each; null where it has one, of its own number
  const int64_t *positions;    // [tokens]: each token's own, the last one that it looks at
  const float *cosine, *sine;  // [positions, rotated values / 2]
  int64_t tokens, width, blocks_per_sequence, block_rows;
} NAME(cache);

INLINE NAME(stored) * NAME(cached_row)(const NAME(cache) * c, int64_t token, int64_t position) {
  int64_t block = token, within = position;
  if (c->blocks) {
    block = c->blocks[token * c->blocks_per_sequence + position / c->block_rows];
    within = position % c->block_rows;
  }
  return c->rows + (block * c->block_rows + within) * c->width;
}

// ---- the softmax over cached rows, for both kinds of attention

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

// `at` and following values of the rows of a piece.
INLINE void NAME(prefetch_rows)(const NAME(cache) * c, const NAME(stored) * rows, int64_t count, int64_t at, int64_t size) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < size; i += 64 / sizeof *rows) __builtin_prefetch(rows + r * c->width + at + i);
}

// Scores [heads, PIECE] of a piece become e^(score - highest), after `factor` has said by what earlier ones are to shrink.
INLINE void NAME(weigh)(NAME(unit) * u, float *scores, int64_t count, float scale, float *factor) {
  for (int64_t h = 0; h < u->heads; h++) {
    float *score = scores + h * NAME(PIECE);
    for (int64_t s = count; s < rounded_up(count, LANES); s++) score[s] = -INFINITY;
    vector largest = load_float32(score), sum = {0};
    for (int64_t s = LANES; s < count; s += LANES) {
      vector other = load_float32(score + s);
      largest = where(other > largest, other, largest);
    }
    float before = u->highest[h], now = largest_lane(largest);
    factor[h] = 1.0f;
    if (now > before) {
      u->highest[h] = now;
      factor[h] = exponential(splat((before - now) * scale))[0];
    }
    for (int64_t s = 0; s < count; s += LANES) {
      vector weight = exponential((load_float32(score + s) - u->highest[h]) * scale);
      store_float32(score + s, weight);
      sum += weight;
    }
    u->sum[h] = u->sum[h] * factor[h] + sum_of_lanes(sum);
  }
}

// Some units look at some positions of one token's sequence, piece by piece; while one piece is worked on, the next is fetched.
// Each piece is summed apart: one long sum would lose bits.
static void NAME(attend)(const NAME(attention) * a, int64_t token, range positions, NAME(unit) * units, int64_t count) {
  const NAME(cache) *c = &a->cache;
  int64_t padded = rounded_up(a->key_size, STEP);
  float scores[count][PANEL * NAME(PIECE)], factor[PANEL];
  for (int64_t start = positions.first, end; start < positions.end; start = end) {
    end = NAME(end_of_piece)(c, start, positions.end);
    const NAME(stored) *rows = NAME(cached_row)(c, token, start);
    const NAME(stored) *next = end < positions.end ? NAME(cached_row)(c, token, end) : 0;
    int64_t next_count = next ? NAME(end_of_piece)(c, end, positions.end) - end : 0;
    for (int64_t i = 0; i < count; i++) {
      NAME(unit) *u = units + i;
      const NAME(packed) * queries[PANEL];
      for (int64_t h = 0; h < u->heads; h++) queries[h] = a->queries + ((u->head + h) * c->tokens + token) * padded;
      if (i == 0 || u->key != u[-1].key) NAME(prefetch_rows)(c, next, next_count, u->key, a->key_size);
      NAME(all_dots)(rows + u->key, c->width, queries, a->key_size, end - start, u->heads, scores[i], NAME(PIECE));
    }
    for (int64_t i = 0; i < count; i++) {
      NAME(unit) *u = units + i;
      if (u->value >= u->key + a->key_size && (i == 0 || u->value != u[-1].value))
        NAME(prefetch_rows)(c, next, next_count, u->value, a->value_size);
      NAME(weigh)(u, scores[i], end - start, a->scale, factor);
      NAME(mix)(rows + u->value, c->width, end - start, a->value_size, scores[i], NAME(PIECE), factor, u->heads, u->values,
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
                               float *values) {
  int64_t chunks = NAME(chunks)(&a->cache, token), size = a->value_size;
  memset(values, 0, a->heads * size * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    units[i].values = values + (units[i].head - units->head) * size;
    for (int64_t h = 0; h < units[i].heads; h++) units[i].highest[h] = -INFINITY, units[i].sum[h] = 0;
  }
  NAME(attend)(a, token, share(a->cache.positions[token] + 1, NAME(PIECE), (member){chunk, chunks}), units, count);
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
  for (int64_t t = 0; t < c->tokens; t++) total += sets * NAME(chunks)(c, t) * NAME(chunk_cost)(c, t);
  range mine = share(total, 1, m);
  for (int64_t t = 0; t < c->tokens; t++) {
    int64_t items = sets * NAME(chunks)(c, t), cost = NAME(chunk_cost)(c, t);
    range of_token = items_within(mine, at, items, cost);
    for (int64_t i = of_token.first; i < of_token.end; i++) {
      int64_t first = i % sets * together;
      NAME(attend_chunk)(a, t, i / sets, units + first, least(together, count - first), values);
    }
    at += items * cost;
  }
  if (a->most_chunks == 1) return;
  wait_for_team();
  mine = share(c->tokens * a->heads, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++)
    if (NAME(chunks)(c, i / a->heads) > 1) NAME(merge_chunks)(a, i / a->heads, i % a->heads, values);
}

// ---- grouped-query attention

// Queries, keys and values as projected. Each token's rotated keys (of all key heads) and values become its row; every group
// of heads / key_heads queries attends to one key head.
typedef struct {
  const NAME(stored) * query, *key, *value;  // [tokens, heads * size], [tokens, key_heads * size] twice
  const NAME(stored) * query_norm, *key_norm;  // [size] or null: norms of each head before it is rotated
  NAME(stored) * output;                       // [tokens, heads * size]
  NAME(cache) cache;                           // rows of key_heads * size keys, then as many values
  int64_t heads, key_heads, size;
  float scale, eps;
} NAME(grouped_query_attention_arguments);

typedef NAME(attention) NAME(grouped_query_attention_memory);

TAKE(grouped_query_attention) {
  NAME(attention) attention = {
      .cache = a->cache,
      .heads = a->heads,
      .key_heads = a->key_heads,
      .key_size = a->size,
      .value_size = a->size,
      .first_value = a->key_heads * a->size,
      .scale = a->scale,
      .queries = take(memory, a->cache.tokens * a->heads * rounded_up(a->size, STEP) * sizeof(NAME(packed))),
      .output = a->output,
  };
  NAME(take_attention)(&attention, threads, memory);
  return attention;
}

// One head, normalised if `norm` is given, and rotated: value i turns with value i + size / 2.
static void NAME(rotate_halves)(const NAME(grouped_query_attention_arguments) * a, const NAME(stored) * x,
                                const NAME(stored) * norm, int64_t position, float *to) {
  int64_t half = a->size / 2;
  const float *cosine = a->cache.cosine + position * half, *sine = a->cache.sine + position * half;
  float scale = norm ? NAME(inverse_rms)(x, a->size, a->eps) : 1.0f;
  for (int64_t i = 0; i < half; i += LANES) {
    int64_t left = half - i;
    vector first = LOAD_PART(x + i, left), second = LOAD_PART(x + half + i, left);
    if (norm) {
      first = first * scale * LOAD_PART(norm + i, left);
      second = second * scale * LOAD_PART(norm + half + i, left);
    }
    vector c = load_part_float32(cosine + i, left), s = load_part_float32(sine + i, left);
    store_part_float32(to + i, first * c - second * s, left);
    store_part_float32(to + half + i, second * c + first * s, left);
  }
}

// Everything that is done to one head of queries or keys and values before any token attends.
static void NAME(prepare_head)(const NAME(grouped_query_attention_arguments) * a, int64_t token, int64_t head,
                               NAME(packed) * queries) {
  int64_t size = a->size, padded = rounded_up(size, STEP), position = a->cache.positions[token];
  float rotated[padded];
  if (head < a->heads) {
    NAME(packed) *to = queries + (head * a->cache.tokens + token) * padded;
    memset(rotated, 0, sizeof rotated);
    NAME(rotate_halves)(a, a->query + (token * a->heads + head) * size, a->query_norm, position, rotated);
    for (int64_t i = 0; i < padded; i += LANES) STORE_PACKED(to + i, load_float32(rotated + i));
  } else {
    int64_t of = head - a->heads, from = (token * a->key_heads + of) * size;
    NAME(stored) *row = NAME(cached_row)(&a->cache, token, position);
    NAME(rotate_halves)(a, a->key + from, a->key_norm, position, rotated);
    NAME(store_all)(row + of * size, rotated, size);
    memcpy(row + (a->key_heads + of) * size, a->value + from, size * sizeof *row);
  }
}

PERFORM(grouped_query_attention) {
  NAME(attention) attention = NAME(take_grouped_query_attention)(a, m.count, &memory);
  int64_t prepared = a->heads + a->key_heads;
  range mine = share(a->cache.tokens * prepared, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++)
    NAME(prepare_head)(a, i / prepared, i % prepared, (NAME(packed) *)attention.queries);
  wait_for_team();
  NAME(attend_all)(&attention, m);
  return 0;
}

// ---- latent attention

// Attention to cached latents ("absorbed": the keys' up-projection is folded into the query, the values' into the output; V2
// section 2.1.2).
//
// With `key_up`, queries are [tokens, heads, nope + rope] as projected, and get rotated and absorbed here; without, they are
// [tokens, heads, rank + rope], ready. With `value_up`, outputs are [tokens, heads, value_size], without, latents
// [tokens, heads, rank]. With `compressed` [tokens, rank + rope], each token's own row is made from it and cached first.
typedef struct {
  const NAME(stored) * query, *key_up, *value_up;  // of each head [nope, rank] and [value_size, rank], `head_stride` apart
  NAME(stored) * output;
  const NAME(stored) * compressed, *norm;  // and the norm of its first `rank` values
  NAME(cache) cache;                       // rows of rank + rope values
  int64_t heads, nope, rope, rank, value_size, head_stride;
  float scale, eps;
} NAME(latent_attention_arguments);

typedef NAME(attention) NAME(latent_attention_memory);

TAKE(latent_attention) {
  int64_t pairs = a->cache.tokens * a->heads;
  NAME(attention) attention = {
      .cache = a->cache,
      .heads = a->heads,
      .key_heads = 1,
      .key_size = a->rank + a->rope,
      .value_size = a->rank,
      .scale = a->scale,
      .queries = take(memory, pairs * rounded_up(a->rank + a->rope, STEP) * sizeof(NAME(packed))),
      .output = a->output,
  };
  if (a->value_up) attention.packed_output = take(memory, pairs * rounded_up(a->rank, STEP) * sizeof(NAME(packed)));
  NAME(take_attention)(&attention, threads, memory);
  return attention;
}

// Rotate the last `rope` of rank + rope or nope + rope values.
INLINE void NAME(rotate_at)(const NAME(latent_attention_arguments) * a, const NAME(stored) * x, int64_t token, float *to) {
  int64_t angles = a->cache.positions[token] * (a->rope / 2);
  NAME(rotate)(x, a->cache.cosine + angles, a->cache.sine + angles, a->rope, to);
}

// The token's row, and its queries but for what is absorbed.
static void NAME(prepare_token)(const NAME(latent_attention_arguments) * a, int64_t token, NAME(packed) * queries) {
  int64_t width = a->cache.width, padded = rounded_up(width, STEP), tokens = a->cache.tokens, rank = a->rank;
  float rotated[a->rope];
  if (a->compressed) {
    const NAME(stored) *from = a->compressed + token * width;
    NAME(stored) *row = NAME(cached_row)(&a->cache, token, a->cache.positions[token]);
    NAME(normalise)(from, a->norm, row, rank, a->eps);
    NAME(rotate_at)(a, from + rank, token, rotated);
    NAME(store_all)(row + rank, rotated, a->rope);
  }
  for (int64_t h = 0; h < a->heads; h++) {
    NAME(packed) *to = queries + (h * tokens + token) * padded;
    if (!a->key_up) {
      NAME(pack_token)(a->query + (token * a->heads + h) * width, 0, 0, width, padded, to);
      continue;
    }
    float tail[padded - rank];
    memset(tail, 0, sizeof tail);
    NAME(rotate_at)(a, a->query + (token * a->heads + h) * (a->nope + a->rope) + a->nope, token, tail);
    NAME(pack_values)(to + rank, tail, padded - rank);
  }
}

enum { NAME(COLUMNS) = 64 };  // of an up-projection that one member multiplies at a time

// Absorbed queries of one head, all tokens and COLUMNS values from `column` on.
static void NAME(absorb)(const NAME(latent_attention_arguments) * a, int64_t head, int64_t column, NAME(packed) * queries) {
  int64_t tokens = a->cache.tokens, padded = rounded_up(a->cache.width, STEP), width = least(NAME(COLUMNS), a->rank - column);
  float coefficients[4 * a->nope], absorbed[4 * NAME(COLUMNS)];
  const float from_zero[4] = {0};
  for (int64_t first = 0; first < tokens; first += 4) {
    int64_t now = least(4, tokens - first);
    for (int64_t t = 0; t < now; t++) {
      const NAME(stored) *query = a->query + ((first + t) * a->heads + head) * (a->nope + a->rope);
      for (int64_t n = 0; n < a->nope; n += LANES)
        store_part_float32(coefficients + t * a->nope + n, LOAD_PART(query + n, a->nope - n), a->nope - n);
    }
    memset(absorbed, 0, sizeof absorbed);
    NAME(mix)(a->key_up + head * a->head_stride + column, a->rank, a->nope, width, coefficients, a->nope, from_zero, now,
              absorbed, NAME(COLUMNS));
    for (int64_t t = 0; t < now; t++)
      NAME(pack_values)(queries + (head * tokens + first + t) * padded + column, absorbed + t * NAME(COLUMNS), width);
  }
}

// Value block of one head for all tokens: BLOCK rows of its value_up from `row` on.
static void NAME(output_values)(const NAME(latent_attention_arguments) * a, const NAME(packed) * latents, int64_t head,
                                int64_t row) {
  int64_t tokens = a->cache.tokens, padded = rounded_up(a->rank, STEP), height = least(BLOCK, a->value_size - row);
  float block[PANEL * BLOCK];
  for (int64_t first = 0; first < tokens; first += PANEL) {
    int64_t now = least(PANEL, tokens - first);
    const NAME(packed) * pointers[PANEL];
    for (int64_t t = 0; t < now; t++) pointers[t] = latents + (head * tokens + first + t) * padded;
    NAME(all_dots)(a->value_up + head * a->head_stride + row * a->rank, a->rank, pointers, a->rank, height, now, block, BLOCK);
    for (int64_t t = 0; t < now; t++)
      NAME(store_all)(a->output + ((first + t) * a->heads + head) * a->value_size + row, block + t * BLOCK, height);
  }
}

PERFORM(latent_attention) {
  NAME(attention) attention = NAME(take_latent_attention)(a, m.count, &memory);
  NAME(packed) *queries = (NAME(packed) *)attention.queries;
  range mine = share(a->cache.tokens, 1, m);
  for (int64_t t = mine.first; t < mine.end; t++) NAME(prepare_token)(a, t, queries);
  if (a->key_up) {
    int64_t blocks = (a->rank + NAME(COLUMNS) - 1) / NAME(COLUMNS);
    mine = share(a->heads * blocks, 1, m);
    for (int64_t i = mine.first; i < mine.end; i++) NAME(absorb)(a, i / blocks, i % blocks * NAME(COLUMNS), queries);
  }
  wait_for_team();
  NAME(attend_all)(&attention, m);
  if (a->value_up) {
    wait_for_team();
    int64_t blocks = (a->value_size + BLOCK - 1) / BLOCK;
    mine = share(a->heads * blocks, 1, m);
    for (int64_t i = mine.first; i < mine.end; i++)
      NAME(output_values)(a, attention.packed_output, i / blocks, i % blocks * BLOCK);
  }
  return 0;
}
