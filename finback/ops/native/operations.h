// Products, norms and the other operations without a cache, for one stored type: included twice, after packed.h.
//
// Each takes one struct, which calls.py mirrors field by field: pointers and sizes, all 64 bits wide, then floats. Outputs
// are split among threads and never summed across them, so results do not depend on the number of threads.

// The two functions of an operation that `run_program` calls, from one that works on its arguments, and one that lays out its
// memory.
#define PERFORM(name)                                                                                                  \
  static int NAME(perform_##name)(const NAME(name##_arguments) * a, member m, arena memory);                           \
  int NAME(name)(const void *arguments, member m, arena memory) { return NAME(perform_##name)(arguments, m, memory); } \
  static int NAME(perform_##name)(const NAME(name##_arguments) * a, member m, __attribute__((unused)) arena memory)
#define TAKE(name)                                                                                                     \
  static NAME(name##_memory) NAME(take_##name)(const NAME(name##_arguments) * a, int64_t threads, arena *memory);      \
  void NAME(name##_memory_of)(const void *arguments, int64_t threads, arena *memory) {                                 \
    NAME(take_##name)(arguments, threads, memory);                                                                     \
  }                                                                                                                    \
  static NAME(name##_memory) NAME(take_##name)(const NAME(name##_arguments) * a, int64_t threads, arena *memory)

// ---- linear

// outputs[i] [tokens, rows[i]] = weights[i] x + biases[i] (+ residual), for up to 3 matrices that share x, normalised first if
// `norm` is given.
typedef struct {
  const NAME(stored) * x, *norm;  // [tokens, inputs], [inputs] or null
  const NAME(stored) * biases[3];  // [rows[i]] or null
  NAME(stored) * outputs[3];
  const NAME(stored) * residual;  // [tokens, rows[0]] or null, added to the first output; may be that output
  float *unrounded;               // the first output in float32 instead, or null
  NAME(matrix) weights[3];        // [rows[i], inputs]
  int64_t rows[3], tokens, inputs;
  float eps;
} NAME(linear_arguments);

typedef NAME(activations) NAME(linear_memory);

TAKE(linear) { return NAME(take_activations)(a->tokens, a->inputs, threads, memory); }

static void NAME(linear_rows)(const NAME(linear_arguments) * a, int i, range rows, const NAME(activations) * x) {
  const NAME(stored) *residual = i == 0 ? a->residual : 0, *bias = a->biases[i];
  float *unrounded = i == 0 ? a->unrounded : 0, block[NAME(PRODUCT)];
  for (int64_t row = rows.first; row < rows.end; row += BLOCK) {
    int64_t count = least(BLOCK, rows.end - row);
    for (int64_t first = 0; first < a->tokens; first += NAME(tokens_now)(x, first)) {
      NAME(matrix_product)(&a->weights[i], row, count, x, first, block);
      for (int64_t t = 0; t < NAME(tokens_now)(x, first); t++)
        for (int64_t r = 0; r < count; r += LANES) {
          int64_t at = (first + t) * a->rows[i] + row + r;
          vector value = load_float32(block + t * BLOCK + r);
          if (bias) value += LOAD_PART(bias + row + r, count - r);
          if (residual) value += LOAD_PART(residual + at, count - r);
          if (unrounded)
            store_part_float32(unrounded + at, value, count - r);
          else
            STORE_PART(a->outputs[i] + at, value, count - r);
        }
    }
  }
}

PERFORM(linear) {
  NAME(activations) x = NAME(take_linear)(a, m.count, &memory);
  NAME(pack)(&x, a->x, a->norm, a->eps, m);
  // All matrices as one list of rows, cut into equal shares of whole blocks.
  int64_t all = 0;
  for (int64_t i = 0; i < 3; i++) all += rounded_up(a->rows[i], BLOCK);
  range mine = share(all, BLOCK, m);
  for (int64_t i = 0, start = 0; i < 3; start += rounded_up(a->rows[i], BLOCK), i++) {
    range rows = {most(mine.first - start, 0), least(mine.end - start, a->rows[i])};
    NAME(linear_rows)(a, i, rows, &x);
  }
  return 0;
}

// ---- embedding

// output [tokens, size] = table[ids]. Returns 1 if an id is not that of a row.
typedef struct {
  const NAME(stored) * table;  // [rows, size]
  const int64_t *ids;          // [tokens]
  NAME(stored) * output;
  int64_t tokens, rows, size;
} NAME(embedding_arguments);

PERFORM(embedding) {
  for (int64_t t = 0; t < a->tokens; t++)
    if (a->ids[t] < 0 || a->ids[t] >= a->rows) return 1;
  range mine = share(a->tokens, 1, m);
  for (int64_t t = mine.first; t < mine.end; t++)
    memcpy(a->output + t * a->size, a->table + a->ids[t] * a->size, a->size * sizeof *a->output);
  return 0;
}

// ---- norm

// output = norm * x / rms(x), for [tokens, size].
typedef struct {
  const NAME(stored) * x, *norm;
  NAME(stored) * output;
  int64_t tokens, size;
  float eps;
} NAME(rms_norm_arguments);

INLINE void NAME(normalise)(const NAME(stored) * x, const NAME(stored) * norm, NAME(stored) * to, int64_t size, float eps) {
  float scale = NAME(inverse_rms)(x, size, eps);
  for (int64_t k = 0; k < size; k += LANES)
    STORE_PART(to + k, LOAD_PART(x + k, size - k) * scale * LOAD_PART(norm + k, size - k), size - k);
}

PERFORM(rms_norm) {
  range mine = share(a->tokens, 1, m);
  for (int64_t t = mine.first; t < mine.end; t++)
    NAME(normalise)(a->x + t * a->size, a->norm, a->output + t * a->size, a->size, a->eps);
  return 0;
}

// ---- activation

// output = silu(gate) * up, element by element.
typedef struct {
  const NAME(stored) * gate, *up;
  NAME(stored) * output;
  int64_t count;
} NAME(swiglu_arguments);

PERFORM(swiglu) {
  range mine = share(a->count, 64, m);
  for (int64_t i = mine.first; i < mine.end; i += LANES) {
    int64_t left = mine.end - i;
    STORE_PART(a->output + i, silu(LOAD_PART(a->gate + i, left)) * LOAD_PART(a->up + i, left), left);
  }
  return 0;
}

// ---- rotary position embedding

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

INLINE void NAME(store_all)(NAME(stored) * to, const float *from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) STORE_PART(to + i, load_part_float32(from + i, count - i), count - i);
}

PERFORM(rotary) {
  float rotated[a->size];
  range mine = share(a->tokens * a->heads, 1, m);
  for (int64_t row = mine.first; row < mine.end; row++) {
    int64_t angles = row / a->heads * (a->size / 2);
    NAME(rotate)(a->x + row * a->size, a->cosine + angles, a->sine + angles, a->size, rotated);
    NAME(store_all)(a->output + row * a->size, rotated, a->size);
  }
  return 0;
}
