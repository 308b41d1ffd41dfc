// Attention to cached latents, for one stored type: included twice, after attention.h. It is "absorbed": the keys' up-projection is
// folded into the query, the values' into the output (V2 section 2.1.2).

// With `key_up`, queries are [tokens, heads, nope + rope] as projected, and get rotated and absorbed here; without, they are
// [tokens, heads, rank + rope], ready. With `value_up`, outputs are [tokens, heads, value_size], without, latents
// [tokens, heads, rank]. With `compressed` [tokens, rank + rope], each token's own row is made from it and cached first.
typedef struct {
  const NAME(stored) * query, *key_up, *value_up;  // of each head [nope, rank] and [value_size, rank], `head_stride` apart
  NAME(stored) * output;
  const NAME(stored) * compressed, *norm;  // and the norm of its first `rank` values
  NAME(cache) cache;                       // rows of rank + rope values, the latter `kept` where rows are compressed
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
    NAME(stored) row[width];
    NAME(normalise)(from, a->norm, row, rank, a->eps);
    NAME(rotate_at)(a, from + rank, token, rotated);
    NAME(store_all)(row + rank, rotated, a->rope);
    NAME(write_row)(&a->cache, row, NAME(cached_row)(&a->cache, token, a->cache.positions[token]));
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
  int64_t along = rounded_up(a->nope, STEP);
  NAME(packed) coefficients[4 * along];
  float absorbed[4 * NAME(COLUMNS)];
  const float from_zero[4] = {0};
  for (int64_t first = 0; first < tokens; first += 4) {
    int64_t now = least(4, tokens - first);
    for (int64_t t = 0; t < now; t++)
      NAME(pack_token)(a->query + ((first + t) * a->heads + head) * (a->nope + a->rope), 0, 0, a->nope, along,
                       coefficients + t * along);
    memset(absorbed, 0, sizeof absorbed);
    NAME(mix)(a->key_up + head * a->head_stride + column, a->rank, a->nope, width, coefficients, along, from_zero, now,
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
    NAME(all_dots)(a->value_up + head * a->head_stride + row * a->rank, a->rank, pointers, a->rank, FETCH_SHORT, height, now, block, BLOCK);
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
