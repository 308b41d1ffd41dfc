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

// What is done before any token attends, to one head of queries,
static void NAME(prepare_query)(const NAME(grouped_query_attention_arguments) * a, int64_t token, int64_t head,
                                NAME(packed) * queries) {
  int64_t size = a->size, padded = rounded_up(size, STEP);
  float rotated[padded];
  NAME(packed) *to = queries + (head * a->cache.tokens + token) * padded;
  memset(rotated, 0, sizeof rotated);
  NAME(rotate_halves)(a, a->query + (token * a->heads + head) * size, a->query_norm, a->cache.positions[token], rotated);
  for (int64_t i = 0; i < padded; i += LANES) STORE_PACKED(to + i, load_float32(rotated + i));
}

// and to all heads of keys and values: the token's row.
static void NAME(prepare_row)(const NAME(grouped_query_attention_arguments) * a, int64_t token) {
  int64_t size = a->size, width = a->key_heads * size, position = a->cache.positions[token];
  NAME(stored) row[2 * width];
  float rotated[rounded_up(size, STEP)];
  for (int64_t from = 0; from < width; from += size) {
    NAME(rotate_halves)(a, a->key + token * width + from, a->key_norm, position, rotated);
    NAME(store_all)(row + from, rotated, size);
  }
  memcpy(row + width, a->value + token * width, width * sizeof *row);
  NAME(write_row)(&a->cache, row, NAME(cached_row)(&a->cache, token, position));
}

PERFORM(grouped_query_attention) {
  NAME(attention) attention = NAME(take_grouped_query_attention)(a, m.count, &memory);
  int64_t prepared = a->heads + 1;
  range mine = share(a->cache.tokens * prepared, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++) {
    int64_t token = i / prepared, head = i % prepared;
    if (head < a->heads)
      NAME(prepare_query)(a, token, head, (NAME(packed) *)attention.queries);
    else
      NAME(prepare_row)(a, token);
  }
  wait_for_team();
  NAME(attend_all)(&attention, m);
  return 0;
}
