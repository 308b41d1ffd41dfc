// The kernels of training.c for one stored type.
//
// Functions take pointers, then 64-bit sizes, then floats. Rows lie `stride` elements apart where a stride is given, else `size`.

// The first `now` of the vector's lanes (or all of them); the others are zero.
INLINE vector NAME(load_some)(const STORED *from, int64_t now) {
  if (now >= LANES) return LOAD(from);
  STORED part[LANES] = {0};
  memcpy(part, from, now * sizeof *part);
  return LOAD(part);
}

INLINE void NAME(store_some)(STORED *to, vector value, int64_t now) {
  if (now >= LANES) {
    STORE(to, value);
    return;
  }
  STORED part[LANES];
  STORE(part, value);
  memcpy(to, part, now * sizeof *part);
}

// ---- RMSNorm

// output = weight x scale with scale = 1 / sqrt(mean(x^2) + eps): x [rows, size], weight float32 [size], scales float32 [rows].
void NAME(rms_norm)(const STORED *x, const float *weight, STORED *output, float *scales, int64_t rows, int64_t size,
                    int64_t stride, int64_t threads, float eps) {
  ROWS_IN_PARALLEL(threads)
  for (int64_t row = 0; row < rows; row++) {
    const STORED *from = x + row * stride;
    STORED *to = output + row * size;
    vector sum = splat(0), other = splat(0);
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
      vector a = LOAD(from + i), b = LOAD(from + i + LANES);
      sum += a * a;
      other += b * b;
    }
    for (; i < size; i += LANES) {
      vector a = NAME(load_some)(from + i, size - i);
      sum += a * a;
    }
    float scale = 1.0f / sqrtf(sum_of_lanes(sum + other) / size + eps);
    scales[row] = scale;
    EACH_VECTOR(i, size)
    NAME(store_some)(to + i, NAME(load_some)(from + i, size - i) * scale * load_float32(weight + i), size - i);
  }
}

// With n = x scale: grad_x = scale (grad weight - n mean(grad weight n)); grad_weight = sum over rows of grad n, float32.
// `parts` is float32 [PARTS, padded], for the sums; weight, grad_weight and parts are padded to whole vectors.
void NAME(rms_norm_backward)(const STORED *grad, const STORED *x, const float *weight, const float *scales, STORED *grad_x,
                             float *grad_weight, float *parts, int64_t rows, int64_t size, int64_t stride, int64_t threads) {
  int64_t padded = (size + LANES - 1) / LANES * LANES, per_part = (rows + PARTS - 1) / PARTS;
  ROWS_IN_PARALLEL(threads)
  for (int64_t p = 0; p < PARTS; p++) {
    float *part = parts + p * padded;
    memset(part, 0, padded * sizeof *part);
    for (int64_t row = p * per_part; row < least(rows, (p + 1) * per_part); row++) {
      const STORED *g = grad + row * size, *from = x + row * stride;
      STORED *to = grad_x + row * size;
      vector scale = splat(scales[row]), sum = splat(0);
      EACH_VECTOR(i, size) {
        vector product = NAME(load_some)(g + i, size - i) * (NAME(load_some)(from + i, size - i) * scale);
        sum += product * load_float32(weight + i);
        store_float32(part + i, load_float32(part + i) + product);
      }
      vector projection = splat(sum_of_lanes(sum) / size);
      EACH_VECTOR(i, size) {
        vector normalised = NAME(load_some)(from + i, size - i) * scale;
        vector weighted = NAME(load_some)(g + i, size - i) * load_float32(weight + i);
        NAME(store_some)(to + i, scale * (weighted - normalised * projection), size - i);
      }
    }
  }
  memset(grad_weight, 0, padded * sizeof *grad_weight);
  for (int64_t p = 0; p < PARTS; p++)
    EACH_VECTOR(i, padded) store_float32(grad_weight + i, load_float32(grad_weight + i) + load_float32(parts + p * padded + i));
}

// ---- SwiGLU

// output = silu(gate) up (row_weights): all [rows, size], row_weights float32 [rows] or null.
void NAME(swiglu)(const STORED *gate, const STORED *up, const float *row_weights, STORED *output, int64_t rows, int64_t size,
                  int64_t threads) {
  ROWS_IN_PARALLEL(threads)
  for (int64_t row = 0; row < rows; row++) {
    vector weight = splat(row_weights ? row_weights[row] : 1.0f);
    EACH_VECTOR(i, size) {
      int64_t at = row * size + i, now = size - i;
      NAME(store_some)(output + at, silu(NAME(load_some)(gate + at, now)) * NAME(load_some)(up + at, now) * weight, now);
    }
  }
}

void NAME(swiglu_backward)(const STORED *grad, const STORED *gate, const STORED *up, const float *row_weights,
                           STORED *grad_gate, STORED *grad_up, float *grad_weights, int64_t rows, int64_t size,
                           int64_t threads) {
  ROWS_IN_PARALLEL(threads)
  for (int64_t row = 0; row < rows; row++) {
    vector weight = splat(row_weights ? row_weights[row] : 1.0f), sum = splat(0);
    EACH_VECTOR(i, size) {
      int64_t at = row * size + i, now = size - i;
      vector x = NAME(load_some)(gate + at, now), u = NAME(load_some)(up + at, now), g = NAME(load_some)(grad + at, now);
      vector sigmoid = 1.0f / (1.0f + exponential(-x)), activation = x * sigmoid, weighted = g * weight;
      sum += activation * u * g;
      NAME(store_some)(grad_gate + at, weighted * u * (sigmoid * (1.0f + x - activation)), now);
      NAME(store_some)(grad_up + at, weighted * activation, now);
    }
    if (row_weights) grad_weights[row] = sum_of_lanes(sum);
  }
}

// ---- cross-entropy

// losses[row] = -log softmax(logits[row])[target]; where `gradient`, the logits become softmax - onehot(target).
// Rows whose target is `ignored` have loss and gradient 0. logits [rows, size], targets [rows], losses float32 [rows];
// scratch float32 [threads, size + LANES]. Returns 0, or 1 if a target is outside of the vocabulary.
int NAME(cross_entropy)(STORED *logits, const int64_t *targets, float *losses, float *scratch, int64_t rows, int64_t size,
                        int64_t ignored, int64_t gradient, int64_t threads) {
  int64_t whole = size / LANES * LANES;
  for (int64_t row = 0; row < rows; row++)
    if (targets[row] != ignored && (targets[row] < 0 || targets[row] >= size)) return 1;
  ROWS_IN_PARALLEL(threads)
  for (int64_t row = 0; row < rows; row++) {
    STORED *x = logits + row * size;
    float *terms = scratch + this_thread() * (size + LANES);
    if (targets[row] == ignored) {
      losses[row] = 0;
      if (gradient) memset(x, 0, size * sizeof *x);
      continue;
    }
    vector most = splat(-INFINITY), sum = splat(0), last = NAME(load_some)(x + whole, size - whole);
    for (int64_t i = 0; i < whole; i += LANES) {
      vector value = LOAD(x + i);
      most = where(value > most, value, most);
    }
    float greatest = -INFINITY, rest = 0;
    for (int lane = 0; lane < LANES; lane++) greatest = most[lane] > greatest ? most[lane] : greatest;
    for (int64_t i = 0; i < size - whole; i++) greatest = last[i] > greatest ? last[i] : greatest;

    for (int64_t i = 0; i < whole; i += LANES) {
      vector term = exponential(LOAD(x + i) - greatest);
      store_float32(terms + i, term);
      sum += term;
    }
    last = exponential(last - greatest);
    store_float32(terms + whole, last);
    for (int64_t i = 0; i < size - whole; i++) rest += last[i];
    float total = sum_of_lanes(sum) + rest, of_target = NAME(load_some)(x + targets[row], 1)[0];
    losses[row] = logf(total) - (of_target - greatest);
    if (!gradient) continue;
    float inverse = 1.0f / total;
    terms[targets[row]] -= total;
    EACH_VECTOR(i, size) NAME(store_some)(x + i, load_float32(terms + i) * inverse, size - i);
  }
  return 0;
}

// ---- attention

// weights = softmax(scale scores), in place, causal: row r of [heads, rows, columns] sees columns 0 .. start + r, where the others
// become 0. scratch float32 [threads, columns + LANES].
void NAME(causal_softmax)(STORED *scores, float *scratch, int64_t heads, int64_t rows, int64_t columns, int64_t start,
                          int64_t threads, float scale) {
  ROWS_IN_PARALLEL(threads)
  for (int64_t row = 0; row < heads * rows; row++) {
    STORED *x = scores + row * columns;
    int64_t seen = start + row % rows + 1;
    float *terms = scratch + this_thread() * (columns + LANES);
    float greatest = -INFINITY;
    vector most = splat(-INFINITY), sum = splat(0);
    EACH_VECTOR(i, seen) {
      vector value = NAME(load_some)(x + i, seen - i) * scale;
      if (seen - i < LANES)
        for (int64_t lane = seen - i; lane < LANES; lane++) value[lane] = -INFINITY;
      most = where(value > most, value, most);
      store_float32(terms + i, value);
    }
    for (int lane = 0; lane < LANES; lane++) greatest = most[lane] > greatest ? most[lane] : greatest;
    EACH_VECTOR(i, seen) {
      vector term = exponential(load_float32(terms + i) - greatest);
      store_float32(terms + i, term);
      sum += term;
    }
    float inverse = 1.0f / sum_of_lanes(sum);
    EACH_VECTOR(i, seen) NAME(store_some)(x + i, load_float32(terms + i) * inverse, seen - i);
    memset(x + seen, 0, (columns - seen) * sizeof *x);
  }
}

// The gradient of the weights becomes that of the scores: grad = scale weights (grad - sum(grad weights)), in place.
void NAME(causal_softmax_backward)(STORED *grad, const STORED *weights, int64_t heads, int64_t rows, int64_t columns,
                                   int64_t start, int64_t threads, float scale) {
  ROWS_IN_PARALLEL(threads)
  for (int64_t row = 0; row < heads * rows; row++) {
    STORED *g = grad + row * columns;
    const STORED *w = weights + row * columns;
    int64_t seen = start + row % rows + 1;
    vector sum = splat(0);
    EACH_VECTOR(i, seen) sum += NAME(load_some)(g + i, seen - i) * NAME(load_some)(w + i, seen - i);
    float total = sum_of_lanes(sum);
    EACH_VECTOR(i, seen) {
      int64_t now = seen - i;
      NAME(store_some)(g + i, (NAME(load_some)(g + i, now) - total) * NAME(load_some)(w + i, now) * scale, now);
    }
    memset(g + seen, 0, (columns - seen) * sizeof *g);
  }
}

// ---- AdamW

// One update of `size` parameters, gradients (both float32) and moments, in place:
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  p = decay p - step m / (sqrt(v) + epsilon)
// with g the gradient times `scale`. Moments are rounded when they are stored, the parameter is updated before.
void NAME(adamw)(float *parameter, const float *gradient, STORED *exp_avg, STORED *exp_avg_sq, int64_t size, int64_t threads,
                 float scale, float beta1, float left1, float beta2, float left2, float decay, float step, float epsilon) {
  int64_t blocks = (size + BLOCK - 1) / BLOCK;
  ROWS_IN_PARALLEL(threads)
  for (int64_t block = 0; block < blocks; block++) {
    int64_t end = least(size, (block + 1) * BLOCK);
    for (int64_t i = block * BLOCK; i < end; i += LANES) {
      int64_t now = end - i;
      vector g = load_some_float32(gradient + i, now) * scale;
      vector m = NAME(load_some)(exp_avg + i, now) * beta1 + g * left1;
      vector v = NAME(load_some)(exp_avg_sq + i, now) * beta2 + g * g * left2;
      vector p = load_some_float32(parameter + i, now) * decay - m * step / (square_root(v) + epsilon);
      NAME(store_some)(exp_avg + i, m, now);
      NAME(store_some)(exp_avg_sq + i, v, now);
      store_some_float32(parameter + i, p, now);
    }
  }
}
