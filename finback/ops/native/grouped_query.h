// Grouped-query attention (Llama, Qwen), for one stored type: included twice, after attention.h.

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
