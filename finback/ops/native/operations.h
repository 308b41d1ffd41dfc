// The operations of a decode step, for one stored type: included twice, after product.h.
//
// Each takes one struct, which build.py mirrors field by field: pointers and sizes, all 64 bits wide, then floats. Outputs
// are split among threads and never summed across them, so results do not depend on the number of threads.

// outputs[i] [tokens, rows[i]] = weights[i] x (+ residual), for up to 3 matrices that share x, normalised first if `norm` is given.
typedef struct {
  const NAME(stored) * x, *norm;  // [tokens, inputs], [inputs] or null
  const NAME(stored) * weights[3];
  NAME(stored) * outputs[3];
  const NAME(stored) * residual;  // [tokens, rows[0]] or null, added to the first output; may be that output
  int64_t rows[3], tokens, inputs, threads;
  float eps;
} NAME(linear_arguments);

static void NAME(linear_rows)(const NAME(linear_arguments) * a, int i, range rows, const NAME(activations) * x) {
  const NAME(stored) *residual = i == 0 ? a->residual : 0;
  float block[BLOCK * PANEL];
  for (int64_t row = rows.first; row < rows.end; row += BLOCK) {
    int64_t count = least(BLOCK, rows.end - row);
    for (int64_t first = 0; first < a->tokens; first += PANEL) {
      NAME(product)(a->weights[i] + row * a->inputs, count, x, first, block);
      for (int64_t m = 0; m < least(PANEL, a->tokens - first); m++) {
        int64_t at = (first + m) * a->rows[i] + row;
        for (int64_t r = 0; r < count; r++)
          a->outputs[i][at + r] = FROM_FLOAT(block[r * PANEL + m] + (residual ? TO_FLOAT(residual[at + r]) : 0.0f));
      }
    }
  }
}

int NAME(linear)(const NAME(linear_arguments) * a) {
  NAME(activations) x = NAME(new_activations)(a->tokens, a->inputs);
  TEAM(a->threads) {
    member m = this_member();
    NAME(pack)(&x, a->x, a->norm, a->eps, m);
    // All matrices as one list of rows, cut into equal shares.
    range mine = share(a->rows[0] + a->rows[1] + a->rows[2], 8, m);
    for (int64_t i = 0, start = 0; i < 3; start += a->rows[i], i++) {
      range rows = {most(mine.first - start, 0), least(mine.end - start, a->rows[i])};
      NAME(linear_rows)(a, i, rows, &x);
    }
  }
  free(x.rows);
  return 0;
}

// output = norm * x / rms(x), for [tokens, size].
typedef struct {
  const NAME(stored) * x, *norm;
  NAME(stored) * output;
  int64_t tokens, size;
  float eps;
} NAME(norm_arguments);

INLINE void NAME(normalise)(const NAME(stored) * x, const NAME(stored) * norm, NAME(stored) * to, int64_t size, float eps) {
  float scale = NAME(inverse_rms)(x, size, eps);
  for (int64_t k = 0; k < size; k++) to[k] = FROM_FLOAT(TO_FLOAT(x[k]) * scale * TO_FLOAT(norm[k]));
}

int NAME(rms_norm)(const NAME(norm_arguments) * a) {
  for (int64_t t = 0; t < a->tokens; t++) NAME(normalise)(a->x + t * a->size, a->norm, a->output + t * a->size, a->size, a->eps);
  return 0;
}

// output = silu(gate) * up, element by element.
typedef struct {
  const NAME(stored) * gate, *up;
  NAME(stored) * output;
  int64_t count;
} NAME(swiglu_arguments);

int NAME(swiglu)(const NAME(swiglu_arguments) * a) {
  for (int64_t i = 0; i < a->count; i += LANES) {
    float gate[LANES] = {0};
    int64_t now = least(LANES, a->count - i);
    for (int64_t j = 0; j < now; j++) gate[j] = TO_FLOAT(a->gate[i + j]);
    store_float32(gate, silu(load_float32(gate)));
    for (int64_t j = 0; j < now; j++) a->output[i + j] = FROM_FLOAT(gate[j] * TO_FLOAT(a->up[i + j]));
  }
  return 0;
}

// output [tokens, heads, size] = x rotated by the angles of cosine, sine [tokens, size / 2], pair by pair (interleaved).
typedef struct {
  const NAME(stored) * x;
  const float *cosine, *sine;
  NAME(stored) * output;
  int64_t tokens, heads, size;
} NAME(rotary_arguments);

INLINE void NAME(rotate)(const NAME(stored) * x, const float *cosine, const float *sine, int64_t size, float *to) {
  for (int64_t i = 0; i < size / 2; i++) {
    float a = TO_FLOAT(x[2 * i]), b = TO_FLOAT(x[2 * i + 1]);
    to[2 * i] = a * cosine[i] - b * sine[i];
    to[2 * i + 1] = a * sine[i] + b * cosine[i];
  }
}

int NAME(rotary)(const NAME(rotary_arguments) * a) {
  float rotated[a->size];
  for (int64_t row = 0; row < a->tokens * a->heads; row++) {
    int64_t angles = row / a->heads * (a->size / 2);
    NAME(rotate)(a->x + row * a->size, a->cosine + angles, a->sine + angles, a->size, rotated);
    for (int64_t i = 0; i < a->size; i++) a->output[row * a->size + i] = FROM_FLOAT(rotated[i]);
  }
  return 0;
}

// Attention of one new token per sequence to its cached latents ("absorbed": the keys' up-projection is folded into the
// query, the values' into the output; V2 section 2.1.2).
//
// With `key_up`, queries are [sequences, heads, nope + rope] as projected, and get rotated and absorbed here; without, they
// are [sequences, heads, rank + rope], ready. With `value_up`, outputs are [sequences, heads, value_size], without, latents
// [sequences, heads, rank]. With `compressed` [sequences, rank + rope], each token's own row is made from it and cached first.
typedef struct {
  const NAME(stored) * query, *key_up, *value_up;  // of each head [nope, rank] and [value_size, rank], `head_stride` apart
  NAME(stored) * output;
  const NAME(stored) * compressed, *norm;  // and the norm of its first `rank` values
  NAME(stored) * rows;                                      // the cache: [blocks, block_rows, rank + rope]
  const int32_t *blocks;       // [sequences, blocks_per_sequence]: the blocks of each; null where it has one, of its number
  const float *cosine, *sine;  // [positions, rope / 2]
  const int64_t *positions;    // [sequences]: of the new token, the last one that it looks at
  int64_t sequences, heads, nope, rope, rank, value_size, head_stride, blocks_per_sequence, block_rows, threads;
  float scale, eps;
} NAME(attention_arguments);

INLINE NAME(stored) * NAME(cached_row)(const NAME(attention_arguments) * a, int64_t sequence, int64_t position) {
  int64_t block = sequence, within = position;
  if (a->blocks) {
    block = a->blocks[sequence * a->blocks_per_sequence + position / a->block_rows];
    within = position % a->block_rows;
  }
  return a->rows + (block * a->block_rows + within) * (a->rank + a->rope);
}

static void NAME(cache_token)(const NAME(attention_arguments) * a, int64_t sequence) {
  int64_t width = a->rank + a->rope, position = a->positions[sequence];
  const NAME(stored) *from = a->compressed + sequence * width;
  NAME(stored) *row = NAME(cached_row)(a, sequence, position);
  NAME(normalise)(from, a->norm, row, a->rank, a->eps);
  float rotated[a->rope];
  NAME(rotate)(from + a->rank, a->cosine + position * a->rope / 2, a->sine + position * a->rope / 2, a->rope, rotated);
  for (int64_t i = 0; i < a->rope; i++) row[a->rank + i] = FROM_FLOAT(rotated[i]);
}

// Queries of one head and some sequences -> packed [sequences, stride] of rank + rope values.
static void NAME(absorb)(const NAME(attention_arguments) * a, int64_t head, range sequences, NAME(packed) * to, int64_t stride) {
  int64_t count = sequences.end - sequences.first, width = a->nope + a->rope;
  float *coefficients = allocate(count * (a->nope + a->rank) * sizeof(float)), *latent = coefficients + count * a->nope;
  memset(latent, 0, count * a->rank * sizeof(float));
  for (int64_t i = 0; i < count; i++)
    for (int64_t n = 0; n < a->nope; n++)
      coefficients[i * a->nope + n] = TO_FLOAT(a->query[((sequences.first + i) * a->heads + head) * width + n]);
  for (int64_t first = 0; first < count; first += 4) {
    const float keep[4] = {1, 1, 1, 1};
    NAME(mix)(a->key_up + head * a->head_stride, a->rank, a->nope, a->rank, coefficients + first * a->nope, a->nope, 1, keep,
              least(4, count - first), latent + first * a->rank, a->rank);
  }
  for (int64_t i = 0; i < count; i++) {
    int64_t position = a->positions[sequences.first + i];
    const NAME(stored) *rope = a->query + ((sequences.first + i) * a->heads + head) * width + a->nope;
    float rotated[a->rope];
    NAME(rotate)(rope, a->cosine + position * a->rope / 2, a->sine + position * a->rope / 2, a->rope, rotated);
    for (int64_t c = 0; c < a->rank; c++) to[i * stride + c] = TO_PACKED(latent[i * a->rank + c]);
    for (int64_t c = 0; c < a->rope; c++) to[i * stride + a->rank + c] = TO_PACKED(rotated[c]);
  }
  free(coefficients);
}

// Softmax over the cached rows of one sequence, for up to PANEL heads at once: queries [heads, stride] -> latent [heads, rank].
// Rows are read once, in pieces that stay in the nearest cache; sums so far are rescaled whenever the maximum grows.
static void NAME(attend)(const NAME(attention_arguments) * a, int64_t sequence, const NAME(packed) * const *query, int64_t heads,
                         float *latent) {
  enum { PIECE = 32, PARTS = PANEL / LANES };
  int64_t width = a->rank + a->rope, end = a->positions[sequence] + 1;
  vector highest[PARTS], sum[PARTS] = {0};
  for (int p = 0; p < PARTS; p++) highest[p] = splat(-INFINITY);
  float scores[PIECE * PANEL] = {0}, factor[PANEL];
  memset(latent, 0, heads * a->rank * sizeof(float));
  for (int64_t start = 0; start < end;) {
    int64_t count = least(PIECE, end - start);
    if (a->blocks) count = least(count, a->block_rows - start % a->block_rows);
    const NAME(stored) *rows = NAME(cached_row)(a, sequence, start);
    NAME(all_dots)(rows, width, query, width, count, heads, scores);
    for (int p = 0; p < PARTS; p++) {
      vector before = highest[p];
      for (int64_t s = 0; s < count; s++) {
        vector score = load_float32(scores + s * PANEL + p * LANES);
        highest[p] = where(score > highest[p], score, highest[p]);
      }
      vector shrink = exponential((before - highest[p]) * a->scale);
      store_float32(factor + p * LANES, shrink);
      vector of_piece = {0};  // pieces are summed apart: one long sum would lose bits
      for (int64_t s = 0; s < count; s++) {
        float *score = scores + s * PANEL + p * LANES;
        vector weight = exponential((load_float32(score) - highest[p]) * a->scale);
        of_piece += weight;
        store_float32(score, weight);
      }
      sum[p] = sum[p] * shrink + of_piece;
    }
    NAME(mix)(rows, width, count, a->rank, scores, 1, PANEL, factor, heads, latent, a->rank);
    start += count;
  }
  for (int p = 0; p < PARTS; p++) store_float32(factor + p * LANES, 1.0f / sum[p]);
  for (int64_t h = 0; h < heads; h++)
    for (int64_t c = 0; c < a->rank; c++) latent[h * a->rank + c] *= factor[h];
}

// The latents of one head -> outputs.
static void NAME(output_values)(const NAME(attention_arguments) * a, int64_t head, range sequences, const float *latent,
                                int64_t stride) {
  int64_t count = sequences.end - sequences.first, rank = a->rank, padded = (rank + STEP - 1) / STEP * STEP;
  if (!a->value_up) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < rank; c++)
        a->output[((sequences.first + i) * a->heads + head) * rank + c] = FROM_FLOAT(latent[i * stride + c]);
    return;
  }
  NAME(packed) *rows = allocate(count * padded * sizeof *rows);
  const NAME(packed) * pointers[PANEL];
  float block[BLOCK * PANEL];
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < padded; c++) rows[i * padded + c] = TO_PACKED(c < rank ? latent[i * stride + c] : 0.0f);
  for (int64_t first = 0; first < count; first += PANEL) {
    int64_t now = least(PANEL, count - first);
    for (int64_t i = 0; i < now; i++) pointers[i] = rows + (first + i) * padded;
    for (int64_t row = 0; row < a->value_size; row += BLOCK) {
      int64_t height = least(BLOCK, a->value_size - row);
      NAME(all_dots)(a->value_up + head * a->head_stride + row * rank, rank, pointers, rank, height, now, block);
      for (int64_t i = 0; i < now; i++)
        for (int64_t r = 0; r < height; r++)
          a->output[((sequences.first + first + i) * a->heads + head) * a->value_size + row + r] =
              FROM_FLOAT(block[r * PANEL + i]);
    }
  }
  free(rows);
}

int NAME(latent_attention)(const NAME(attention_arguments) * a) {
  TEAM(a->threads) {
    member m = this_member();
    if (a->compressed) {
      range mine = share(a->sequences, 1, m);
      for (int64_t i = mine.first; i < mine.end; i++) NAME(cache_token)(a, i);
      wait_for_team();
    }
    // Heads are shared out first, so that each up-projection is read by one thread; sequences where threads are left over.
    int64_t head_parts = least(a->heads, m.count), sequence_parts = least(a->sequences, m.count / head_parts);
    member of_heads = {m.index % head_parts, head_parts}, of_sequences = {m.index / head_parts, sequence_parts};
    if (of_sequences.index < sequence_parts) {
      range heads = share(a->heads, 1, of_heads), sequences = share(a->sequences, 1, of_sequences);
      int64_t mine = heads.end - heads.first, count = sequences.end - sequences.first;
      int64_t width = a->rank + a->rope, padded = (width + STEP - 1) / STEP * STEP;
      NAME(packed) *queries = allocate(mine * count * padded * sizeof *queries);
      float *latents = allocate(mine * count * a->rank * sizeof *latents);
      memset(queries, 0, mine * count * padded * sizeof *queries);
      for (int64_t h = 0; h < mine; h++) {
        NAME(packed) *to = queries + h * count * padded;
        if (a->key_up) {
          NAME(absorb)(a, heads.first + h, sequences, to, padded);
        } else {
          for (int64_t i = 0; i < count; i++)
            for (int64_t c = 0; c < width; c++)
              to[i * padded + c] =
                  TO_PACKED(TO_FLOAT(a->query[((sequences.first + i) * a->heads + heads.first + h) * width + c]));
        }
      }
      float *together = allocate(PANEL * a->rank * sizeof *together);
      for (int64_t i = 0; i < count; i++)
        for (int64_t first = 0; first < mine; first += PANEL) {
          const NAME(packed) * pointers[PANEL];
          int64_t now = least(PANEL, mine - first);
          for (int64_t h = 0; h < now; h++) pointers[h] = queries + ((first + h) * count + i) * padded;
          NAME(attend)(a, sequences.first + i, pointers, now, together);
          for (int64_t h = 0; h < now; h++)
            memcpy(latents + ((first + h) * count + i) * a->rank, together + h * a->rank, a->rank * sizeof *together);
        }
      for (int64_t h = 0; h < mine; h++)
        NAME(output_values)(a, heads.first + h, sequences, latents + h * count * a->rank, a->rank);
      free(together);
      free(latents);
      free(queries);
    }
  }
  return 0;
}
