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

// ---- chunks

enum { NAME(CHUNK) = 256, NAME(MOST_CHUNKS) = 16, NAME(PIECE) = 64 };

INLINE int64_t NAME(chunks)(const NAME(cache) * c, int64_t token) {
  return least(NAME(MOST_CHUNKS), (c->positions[token] + NAME(CHUNK)) / NAME(CHUNK));
}

static int64_t NAME(most_chunks)(const NAME(cache) * c) {
  int64_t chunks = 1;
  for (int64_t t = 0; t < c->tokens; t++) chunks = most(chunks, NAME(chunks)(c, t));
  return chunks;
}

// What it costs to look at one chunk, as a number of positions.
INLINE int64_t NAME(chunk_cost)(const NAME(cache) * c, int64_t token) {
  return c->positions[token] / NAME(chunks)(c, token) + 1;
}

// Some heads of one token that share keys and values, and where these lie in a row.
typedef struct {
  int64_t token, key, key_size, value, value_size, heads;
  const NAME(packed) * queries[PANEL];  // of each head, filled up with zeros to a multiple of STEP
  float scale;
} NAME(looking);

// What a part of the context gives to each head: value h is sum over positions of e^(score - highest[h]) value.
typedef struct {
  float highest[PANEL], sum[PANEL];
  float *values;  // [heads, value_size]
} NAME(seen);

// Rows are read once, in pieces that stay in the nearest cache; sums so far are rescaled whenever the maximum grows. Each
// piece is summed apart: one long sum would lose bits.
static void NAME(attend)(const NAME(cache) * c, const NAME(looking) * l, range positions, NAME(seen) * seen) {
  float scores[PANEL * NAME(PIECE)], factor[PANEL];
  for (int64_t h = 0; h < l->heads; h++) seen->highest[h] = -INFINITY, seen->sum[h] = 0;
  memset(seen->values, 0, l->heads * l->value_size * sizeof(float));
  for (int64_t start = positions.first, count; start < positions.end; start += count) {
    count = least(NAME(PIECE), positions.end - start);
    if (c->blocks) count = least(count, c->block_rows - start % c->block_rows);
    const NAME(stored) *rows = NAME(cached_row)(c, l->token, start);
    NAME(all_dots)(rows + l->key, c->width, l->queries, l->key_size, count, l->heads, scores, NAME(PIECE));
    for (int64_t h = 0; h < l->heads; h++) {
      float *score = scores + h * NAME(PIECE);
      for (int64_t s = count; s < rounded_up(count, LANES); s++) score[s] = -INFINITY;
      vector largest = load_float32(score), sum = {0};
      for (int64_t s = LANES; s < count; s += LANES) {
        vector other = load_float32(score + s);
        largest = where(other > largest, other, largest);
      }
      float before = seen->highest[h], now = largest_lane(largest);
      factor[h] = 1.0f;
      if (now > before) {
        seen->highest[h] = now;
        factor[h] = exponential(splat((before - now) * l->scale))[0];
      }
      for (int64_t s = 0; s < count; s += LANES) {
        vector weight = exponential((load_float32(score + s) - seen->highest[h]) * l->scale);
        store_float32(score + s, weight);
        sum += weight;
      }
      seen->sum[h] = seen->sum[h] * factor[h] + sum_of_lanes(sum);
    }
    NAME(mix)(rows + l->value, c->width, count, l->value_size, scores, NAME(PIECE), factor, l->heads, seen->values,
              l->value_size);
  }
}

// What is kept of the chunks of each head until all are there: [tokens, heads, most chunks].
typedef struct {
  int64_t chunks;
  float *highest, *sum, *values;
} NAME(parts);

static NAME(parts) NAME(take_parts)(const NAME(cache) * c, int64_t heads, int64_t value_size, arena *memory) {
  NAME(parts) parts = {NAME(most_chunks)(c), 0, 0, 0};
  if (parts.chunks == 1) return parts;
  int64_t count = c->tokens * heads * parts.chunks;
  parts.highest = take(memory, count * sizeof(float));
  parts.sum = take(memory, count * sizeof(float));
  parts.values = take(memory, count * value_size * sizeof(float));
  return parts;
}

static void NAME(keep_part)(const NAME(parts) * parts, const NAME(seen) * seen, int64_t h, int64_t at, int64_t value_size) {
  parts->highest[at] = seen->highest[h];
  parts->sum[at] = seen->sum[h];
  memcpy(parts->values + at * value_size, seen->values + h * value_size, value_size * sizeof(float));
}

// values [value_size] = the mixture of `count` parts from `first` on.
static void NAME(merge_parts)(const NAME(parts) * parts, int64_t first, int64_t count, int64_t value_size, float scale,
                              float *values) {
  float highest = parts->highest[first], sum = 0;
  for (int64_t i = first + 1; i < first + count; i++)
    highest = parts->highest[i] > highest ? parts->highest[i] : highest;
  memset(values, 0, value_size * sizeof(float));
  for (int64_t i = first; i < first + count; i++) {
    float factor = exponential(splat((parts->highest[i] - highest) * scale))[0];
    sum += parts->sum[i] * factor;
    for (int64_t v = 0; v < value_size; v++) values[v] += parts->values[i * value_size + v] * factor;
  }
  for (int64_t v = 0; v < value_size; v++) values[v] /= sum;
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

typedef struct {
  NAME(packed) * queries;  // [tokens, heads, size filled up]
  NAME(parts) parts;
} NAME(grouped_query_attention_memory);

TAKE(grouped_query_attention) {
  (void)threads;
  NAME(packed) *queries = take(memory, a->cache.tokens * a->heads * rounded_up(a->size, STEP) * sizeof *queries);
  return (NAME(grouped_query_attention_memory)){queries, NAME(take_parts)(&a->cache, a->heads, a->size, memory)};
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
    NAME(packed) *to = queries + (token * a->heads + head) * padded;
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

// One chunk of one key head's context for one token, and up to PANEL of its queries at a time.
static void NAME(attend_group)(const NAME(grouped_query_attention_arguments) * a,
                               const NAME(grouped_query_attention_memory) * memory, int64_t token, int64_t key_head,
                               int64_t chunk, int64_t chunks) {
  int64_t size = a->size, group = a->heads / a->key_heads, padded = rounded_up(size, STEP);
  float values[PANEL * size];
  NAME(looking) looking = {token, key_head * size, size, (a->key_heads + key_head) * size, size, 0, {0}, a->scale};
  NAME(seen) seen = {{0}, {0}, values};
  for (int64_t first = 0; first < group; first += PANEL) {
    looking.heads = least(PANEL, group - first);
    int64_t row = token * a->heads + key_head * group + first;  // of [tokens, heads]
    for (int64_t h = 0; h < looking.heads; h++) looking.queries[h] = memory->queries + (row + h) * padded;
    NAME(attend)(&a->cache, &looking, share(a->cache.positions[token] + 1, NAME(PIECE), (member){chunk, chunks}), &seen);
    for (int64_t h = 0; h < looking.heads; h++) {
      float *of_head = values + h * size;
      if (chunks > 1) {
        NAME(keep_part)(&memory->parts, &seen, h, (row + h) * memory->parts.chunks + chunk, size);
      } else {
        for (int64_t v = 0; v < size; v++) of_head[v] /= seen.sum[h];
        NAME(store_all)(a->output + (row + h) * size, of_head, size);
      }
    }
  }
}

PERFORM(grouped_query_attention) {
  NAME(grouped_query_attention_memory) taken = NAME(take_grouped_query_attention)(a, m.count, &memory);
  int64_t prepared = a->heads + a->key_heads, total = 0, at = 0;
  range mine = share(a->cache.tokens * prepared, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++) NAME(prepare_head)(a, i / prepared, i % prepared, taken.queries);
  wait_for_team();
  // Tokens, key heads and chunks in this order, each as costly as its context is long.
  const NAME(cache) *c = &a->cache;
  for (int64_t t = 0; t < c->tokens; t++) total += a->key_heads * NAME(chunks)(c, t) * NAME(chunk_cost)(c, t);
  mine = share(total, 1, m);
  for (int64_t t = 0; t < c->tokens; t++) {
    int64_t chunks = NAME(chunks)(c, t), cost = NAME(chunk_cost)(c, t), count = a->key_heads * chunks;
    range items = items_within(mine, at, count, cost);
    for (int64_t i = items.first; i < items.end; i++) NAME(attend_group)(a, &taken, t, i / chunks, i % chunks, chunks);
    at += count * cost;
  }
  if (taken.parts.chunks == 1) return 0;
  wait_for_team();
  mine = share(a->cache.tokens * a->heads, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++) {
    int64_t chunks = NAME(chunks)(&a->cache, i / a->heads);
    float values[a->size];
    if (chunks == 1) continue;
    NAME(merge_parts)(&taken.parts, i * taken.parts.chunks, chunks, a->size, a->scale, values);
    NAME(store_all)(a->output + i * a->size, values, a->size);
  }
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

typedef struct {
  NAME(packed) * queries;  // [heads, tokens, rank + rope filled up]
  NAME(packed) * latents;  // [heads, tokens, rank filled up], where they are to be multiplied by value_up
  float *values;           // of each member, [PANEL, rank]
  NAME(parts) parts;
} NAME(latent_attention_memory);

TAKE(latent_attention) {
  int64_t pairs = a->cache.tokens * a->heads;
  NAME(latent_attention_memory) taken = {0};
  taken.queries = take(memory, pairs * rounded_up(a->cache.width, STEP) * sizeof *taken.queries);
  if (a->value_up) taken.latents = take(memory, pairs * rounded_up(a->rank, STEP) * sizeof *taken.latents);
  taken.values = take(memory, threads * PANEL * a->rank * sizeof(float));
  taken.parts = NAME(take_parts)(&a->cache, a->heads, a->rank, memory);
  return taken;
}

// Rotate the last `rope` of rank + rope or nope + rope values.
INLINE void NAME(rotate_at)(const NAME(latent_attention_arguments) * a, const NAME(stored) * x, int64_t token, float *to) {
  int64_t angles = a->cache.positions[token] * (a->rope / 2);
  NAME(rotate)(x, a->cache.cosine + angles, a->cache.sine + angles, a->rope, to);
}

INLINE void NAME(pack_values)(NAME(packed) * to, const float *from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) STORE_PACKED_PART(to + i, load_part_float32(from + i, count - i), count - i);
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

// The latent of one head, complete: the output, or what value_up is multiplied with.
static void NAME(finish_head)(const NAME(latent_attention_arguments) * a, const NAME(latent_attention_memory) * taken,
                              int64_t token, int64_t head, const float *latent) {
  int64_t rank = a->rank, padded = rounded_up(rank, STEP);
  if (!a->value_up) {
    NAME(store_all)(a->output + (token * a->heads + head) * rank, latent, rank);
    return;
  }
  NAME(packed) *to = taken->latents + (head * a->cache.tokens + token) * padded;
  memset(to + rank, 0, (padded - rank) * sizeof *to);
  NAME(pack_values)(to, latent, rank);
}

// One chunk of the context of one token, for `count` (at most PANEL) heads from `head` on.
static void NAME(attend_heads)(const NAME(latent_attention_arguments) * a, const NAME(latent_attention_memory) * taken,
                               int64_t token, int64_t head, int64_t count, int64_t chunk, float *values) {
  int64_t tokens = a->cache.tokens, rank = a->rank, chunks = NAME(chunks)(&a->cache, token);
  NAME(looking) looking = {token, 0, a->cache.width, 0, rank, count, {0}, a->scale};
  NAME(seen) seen = {{0}, {0}, values};
  for (int64_t h = 0; h < count; h++)
    looking.queries[h] = taken->queries + ((head + h) * tokens + token) * rounded_up(a->cache.width, STEP);
  NAME(attend)(&a->cache, &looking, share(a->cache.positions[token] + 1, NAME(PIECE), (member){chunk, chunks}), &seen);
  for (int64_t h = 0; h < count; h++) {
    float *of_head = values + h * rank;
    if (chunks > 1) {
      NAME(keep_part)(&taken->parts, &seen, h, (token * a->heads + head + h) * taken->parts.chunks + chunk, rank);
      continue;
    }
    for (int64_t v = 0; v < rank; v++) of_head[v] /= seen.sum[h];
    NAME(finish_head)(a, taken, token, head + h, of_head);
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
  NAME(latent_attention_memory) taken = NAME(take_latent_attention)(a, m.count, &memory);
  const NAME(cache) *c = &a->cache;
  range mine = share(c->tokens, 1, m);
  for (int64_t t = mine.first; t < mine.end; t++) NAME(prepare_token)(a, t, taken.queries);
  if (a->key_up) {
    int64_t blocks = (a->rank + NAME(COLUMNS) - 1) / NAME(COLUMNS);
    mine = share(a->heads * blocks, 1, m);
    for (int64_t i = mine.first; i < mine.end; i++)
      NAME(absorb)(a, i / blocks, i % blocks * NAME(COLUMNS), taken.queries);
  }
  wait_for_team();
  // Heads look together, so that rows are read once, but for where there would be too little to share out.
  int64_t all_chunks = 0, total = 0, at = 0;
  for (int64_t t = 0; t < c->tokens; t++) all_chunks += NAME(chunks)(c, t);
  int64_t together = least(PANEL, (a->heads * all_chunks + m.count - 1) / m.count);
  int64_t groups = (a->heads + together - 1) / together;
  for (int64_t t = 0; t < c->tokens; t++) total += groups * NAME(chunks)(c, t) * NAME(chunk_cost)(c, t);
  mine = share(total, 1, m);
  for (int64_t t = 0; t < c->tokens; t++) {
    int64_t count = groups * NAME(chunks)(c, t), cost = NAME(chunk_cost)(c, t);
    range items = items_within(mine, at, count, cost);
    for (int64_t i = items.first; i < items.end; i++) {
      int64_t head = i % groups * together;
      NAME(attend_heads)(a, &taken, t, head, least(together, a->heads - head), i / groups,
                         taken.values + m.index * PANEL * a->rank);
    }
    at += count * cost;
  }
  if (taken.parts.chunks > 1) {
    wait_for_team();
    mine = share(c->tokens * a->heads, 1, m);
    for (int64_t i = mine.first; i < mine.end; i++) {
      int64_t token = i / a->heads, chunks = NAME(chunks)(c, token);
      float *values = taken.values + m.index * PANEL * a->rank;
      if (chunks == 1) continue;
      NAME(merge_parts)(&taken.parts, i * taken.parts.chunks, chunks, a->rank, a->scale, values);
      NAME(finish_head)(a, &taken, token, i % a->heads, values);
    }
  }
  if (a->value_up) {
    wait_for_team();
    int64_t blocks = (a->value_size + BLOCK - 1) / BLOCK;
    mine = share(a->heads * blocks, 1, m);
    for (int64_t i = mine.first; i < mine.end; i++) NAME(output_values)(a, taken.latents, i / blocks, i % blocks * BLOCK);
  }
  return 0;
}
