// Feed-forward of a decode step, for one stored type: included twice, after operations.h.
//
// One struct describes the router, the routed experts, the shared ones (or the dense feed-forward), the norm before and the
// residual after; each part is left out where its pointers are null. Tokens are grouped by expert, so the weights of each
// expert that some token chose are read once, and nothing is gathered: products take their tokens by pointer.

typedef struct {
  const NAME(stored) * x, *norm, *residual;  // [tokens, size]; norm [size] or null; residual [tokens, size] or null
  NAME(stored) * output;                     // [tokens, size], may be x or residual
  const NAME(stored) * router;               // [experts, size], or null: then indices and values are inputs
  const float *bias;                         // [experts] or null
  float *scores;                             // [tokens, experts]
  int64_t *indices;                          // [tokens, choices]
  float *values;                             // [tokens, choices]
  NAME(matrix) gate, up, down;               // [experts, width, size] twice, [experts, size, width]; or not given
  NAME(matrix) shared_gate, shared_up, shared_down;  // [shared_width, size] twice, [size, shared_width]; or not given
  int64_t tokens, size, experts, choices, groups, kept_groups, width, shared_width;
  int64_t softmax, two_per_group, normalise;  // booleans
  float scaling, eps;
} NAME(feed_forward_arguments);

// Token-choice pairs in expert order. Each member makes its own: that is sooner done than waiting for another's.
typedef struct {
  int64_t *start;    // [experts + 1]: the first pair of each expert
  int64_t *pair;     // [tokens * choices]: token * choices + choice
  int64_t *touched;  // [count]: experts with tokens
  int64_t count;
} NAME(dispatch);

typedef struct {
  NAME(activations) x, routed, shared;  // the last two are what lies between gate and up, and down
  NAME(dispatch) dispatch;              // of this member, like the sums
  float *sums;                          // [tokens, BLOCK]
} NAME(feed_forward_memory);

static NAME(feed_forward_memory) NAME(take_of_member)(const NAME(feed_forward_arguments) * a, member m, arena *memory) {
  NAME(feed_forward_memory) taken = {0};
  int64_t experts = NAME(given)(&a->gate) ? a->experts : 0, pairs = NAME(given)(&a->gate) ? a->tokens * a->choices : 0;
  taken.x = NAME(take_activations)(a->tokens, a->size, m.count, memory);
  taken.routed = NAME(take_activations)(pairs, a->width, 1, memory);
  if (NAME(given)(&a->shared_gate)) taken.shared = NAME(take_activations)(a->tokens, a->shared_width, 1, memory);
  for (int64_t i = 0; i < m.count; i++) {
    int64_t *start = take(memory, (2 * experts + 1 + pairs) * sizeof(int64_t));
    float *sums = take(memory, a->tokens * BLOCK * sizeof(float));
    if (i != m.index) continue;
    taken.dispatch = (NAME(dispatch)){start, start + experts + 1, start + experts + 1 + pairs, 0};
    taken.sums = sums;
  }
  return taken;
}

TAKE(feed_forward) { return NAME(take_of_member)(a, (member){0, threads}, memory); }

static void NAME(group_pairs)(const NAME(feed_forward_arguments) * a, NAME(dispatch) * d) {
  int64_t pairs = a->tokens * a->choices;
  d->count = 0;
  memset(d->start, 0, (a->experts + 1) * sizeof *d->start);
  for (int64_t i = 0; i < pairs; i++) d->start[a->indices[i] + 1]++;
  for (int64_t e = 0; e < a->experts; e++) {
    if (d->start[e + 1]) d->touched[d->count++] = e;
    d->start[e + 1] += d->start[e];
  }
  for (int64_t i = 0; i < pairs; i++) d->pair[d->start[a->indices[i]]++] = i;
  for (int64_t e = a->experts; e > 0; e--) d->start[e] = d->start[e - 1];
  d->start[0] = 0;
}

// ---- router

static void NAME(router_logits)(const NAME(feed_forward_arguments) * a, const NAME(activations) * x, member m) {
  range mine = share(a->experts, 8, m);
  float block[NAME(PRODUCT)];
  for (int64_t row = mine.first; row < mine.end; row += BLOCK)
    for (int64_t first = 0; first < a->tokens; first += NAME(tokens_now)(x, first)) {
      int64_t count = least(BLOCK, mine.end - row);
      NAME(product)(a->router + row * a->size, count, x, first, block);
      for (int64_t t = 0; t < NAME(tokens_now)(x, first); t++)
        memcpy(a->scores + (first + t) * a->experts + row, block + t * BLOCK, count * sizeof *block);
    }
}

static void NAME(route_tokens)(const NAME(feed_forward_arguments) * a, member m) {
  routing how = {a->experts, a->choices, a->groups, a->kept_groups, a->softmax, a->two_per_group, a->normalise, a->scaling};
  range mine = share(a->tokens, 1, m);
  for (int64_t t = mine.first; t < mine.end; t++)
    choose_experts(&how, a->scores + t * a->experts, a->bias, a->indices + t * a->choices, a->values + t * a->choices);
}

// ---- gate and up

// to[0 .. count) = silu(gate) * up * weight, one token's part of a row; with the last part, zeros up to `padded`.
INLINE void NAME(activate)(const float *gate, const float *up, float weight, int64_t row, int64_t count,
                           const NAME(activations) * hidden, int64_t at) {
  NAME(packed) *to = (NAME(packed) *)hidden->rows + at * hidden->padded + row;
  for (int64_t r = 0; r < count; r += LANES)
    STORE_PACKED_PART(to + r, silu(load_float32(gate + r)) * load_float32(up + r) * weight, count - r);
  if (row + count == hidden->inputs) memset(to + count, 0, (hidden->padded - hidden->inputs) * sizeof *to);
}

// Products with up to BLOCK rows of a stack of experts, from `row` of the whole stack.
static void NAME(expert_dots)(const NAME(matrix) * stack, int64_t row, int64_t rows, int64_t inputs,
                              const NAME(packed) * const *x, int64_t tokens, float *out) {
  if (stack->plain)
    NAME(all_dots)(stack->plain + row * inputs, inputs, x, inputs, FETCH_SHORT, rows, tokens, out, BLOCK);
  else
    NAME(packed_dots)(stack, row / BLOCK, inputs, x, tokens, out);
}

// One block of rows of one routed expert: its gate and up products for all of its tokens.
static void NAME(routed_rows)(const NAME(feed_forward_arguments) * a, const NAME(feed_forward_memory) * taken, int64_t expert,
                              int64_t row) {
  const NAME(dispatch) *d = &taken->dispatch;
  int64_t count = least(BLOCK, a->width - row), at = expert * a->width + row;
  float gate[PANEL * BLOCK] = {0}, up[PANEL * BLOCK] = {0};
  for (int64_t first = d->start[expert]; first < d->start[expert + 1]; first += PANEL) {
    int64_t tokens = least(PANEL, d->start[expert + 1] - first);
    const NAME(packed) * from[PANEL];
    for (int64_t t = 0; t < tokens; t++) from[t] = taken->x.rows + d->pair[first + t] / a->choices * taken->x.padded;
    NAME(expert_dots)(&a->gate, at, count, a->size, from, tokens, gate);
    NAME(expert_dots)(&a->up, at, count, a->size, from, tokens, up);
    for (int64_t t = 0; t < tokens; t++)
      NAME(activate)(gate + t * BLOCK, up + t * BLOCK, a->values[d->pair[first + t]], row, count, &taken->routed, first + t);
  }
}

// Panels of gate and up products [BLOCK][PANEL] -> panels of hidden values, without a detour over rows: neighbours of a pair are
// neighbours here.
static void NAME(activate_panel)(const float *gate, const float *up, int64_t count, NAME(packed) * to) {
  for (int64_t r = 0; r < count; r += PAIR)
    for (int p = 0; p < PANEL; p += LANES) {
      const float *g = gate + r * PANEL + p, *u = up + r * PANEL + p;
      vector value = silu(load_float32(g)) * load_float32(u);
#if PAIR == 2
      vector other = r + 1 < count ? silu(load_float32(g + PANEL)) * load_float32(u + PANEL) : (vector){0};
      words pair = bfloat16_words(value) | bfloat16_words(other) << 16;
      memcpy(to + (r / 2 * PANEL + p) * 2, &pair, sizeof pair);
#else
      store_float32(to + r * PANEL + p, value);
#endif
    }
}

// One block of rows of the shared experts.
static void NAME(shared_rows)(const NAME(feed_forward_arguments) * a, const NAME(feed_forward_memory) * taken, int64_t row) {
  const NAME(activations) *x = &taken->x, *hidden = &taken->shared;
  int64_t count = least(BLOCK, a->shared_width - row);
  float gate[NAME(PRODUCT)] = {0}, up[NAME(PRODUCT)] = {0};
  if (a->tokens <= MOST_DOTS || a->shared_gate.codes) {
    for (int64_t first = 0; first < a->tokens; first += NAME(tokens_now)(x, first)) {
      NAME(matrix_product)(&a->shared_gate, row, count, x, first, gate);
      NAME(matrix_product)(&a->shared_up, row, count, x, first, up);
      for (int64_t t = 0; t < NAME(tokens_now)(x, first); t++)
        NAME(activate)(gate + t * BLOCK, up + t * BLOCK, 1.0f, row, count, hidden, first + t);
    }
    return;
  }
  const NAME(stored) *gate_rows = a->shared_gate.plain + row * a->size, *up_rows = a->shared_up.plain + row * a->size;
  for (int64_t first = 0; first < a->tokens; first += PANELS * PANEL) {
    int64_t panels = (NAME(tokens_now)(x, first) + PANEL - 1) / PANEL;
    const NAME(packed) *from = x->panels + first * x->padded;
    NAME(all_panel)(gate_rows, a->size, from, PANEL * x->padded, a->size, count, panels, gate);
    NAME(all_panel)(up_rows, a->size, from, PANEL * x->padded, a->size, count, panels, up);
    for (int64_t n = 0; n < panels; n++)
      NAME(activate_panel)(gate + n * BLOCK * PANEL, up + n * BLOCK * PANEL, count,
                           hidden->panels + (first + n * PANEL) * hidden->padded + row * PANEL);
  }
}

// This member's blocks of rows of all experts. A block costs reading its weights, about as much as multiplying 4 tokens.
static void NAME(hidden_rows)(const NAME(feed_forward_arguments) * a, const NAME(feed_forward_memory) * taken, member m) {
  enum { READING = 4 };
  const NAME(dispatch) *d = &taken->dispatch;
  int64_t shared = NAME(given)(&a->shared_gate) ? (a->shared_width + BLOCK - 1) / BLOCK : 0, routed = (a->width + BLOCK - 1) / BLOCK;
  int64_t at = shared * (READING + a->tokens);
  range mine = share(at + routed * (READING * d->count + d->start[NAME(given)(&a->gate) ? a->experts : 0]), 1, m);
  range rows = items_within(mine, 0, shared, READING + a->tokens);
  for (int64_t i = rows.first; i < rows.end; i++) NAME(shared_rows)(a, taken, i * BLOCK);
  for (int64_t e = 0; e < d->count; e++) {
    int64_t expert = d->touched[e], cost = READING + d->start[expert + 1] - d->start[expert];
    rows = items_within(mine, at, routed, cost);
    for (int64_t i = rows.first; i < rows.end; i++) NAME(routed_rows)(a, taken, expert, i * BLOCK);
    at += routed * cost;
  }
}

// ---- down

INLINE void NAME(add_block)(float *sum, const float *block) {
  UNROLL(4) for (int r = 0; r < BLOCK; r += LANES)
    store_float32(sum + r, load_float32(sum + r) + load_float32(block + r));
}

// Output values [row, row + BLOCK) of all tokens: the sum over experts in their order, then shared experts and residual.
static void NAME(down_rows)(const NAME(feed_forward_arguments) * a, const NAME(feed_forward_memory) * taken, int64_t row) {
  const NAME(dispatch) *d = &taken->dispatch;
  int64_t count = least(BLOCK, a->size - row);
  float block[NAME(PRODUCT)] = {0};
  memset(taken->sums, 0, a->tokens * BLOCK * sizeof(float));
  for (int64_t i = 0; i < d->count; i++) {
    int64_t expert = d->touched[i];
    for (int64_t first = d->start[expert]; first < d->start[expert + 1]; first += PANEL) {
      int64_t tokens = least(PANEL, d->start[expert + 1] - first);
      const NAME(packed) * from[PANEL];
      for (int64_t t = 0; t < tokens; t++) from[t] = taken->routed.rows + (first + t) * taken->routed.padded;
      NAME(expert_dots)(&a->down, expert * a->size + row, count, a->width, from, tokens, block);
      for (int64_t t = 0; t < tokens; t++)
        NAME(add_block)(taken->sums + d->pair[first + t] / a->choices * BLOCK, block + t * BLOCK);
    }
  }
  for (int64_t first = 0; NAME(given)(&a->shared_gate) && first < a->tokens; first += NAME(tokens_now)(&taken->shared, first)) {
    NAME(matrix_product)(&a->shared_down, row, count, &taken->shared, first, block);
    for (int64_t t = 0; t < NAME(tokens_now)(&taken->shared, first); t++)
      NAME(add_block)(taken->sums + (first + t) * BLOCK, block + t * BLOCK);
  }
  for (int64_t t = 0; t < a->tokens; t++)
    for (int64_t r = 0; r < count; r += LANES) {
      int64_t at = t * a->size + row + r;
      vector value = load_float32(taken->sums + t * BLOCK + r);
      if (a->residual) value += LOAD_PART(a->residual + at, count - r);
      STORE_PART(a->output + at, value, count - r);
    }
}

// Returns 1 if an index that was given is not that of an expert.
PERFORM(feed_forward) {
  if (NAME(given)(&a->gate) && !a->router)
    for (int64_t i = 0; i < a->tokens * a->choices; i++)
      if (a->indices[i] < 0 || a->indices[i] >= a->experts) return 1;
  NAME(feed_forward_memory) taken = NAME(take_of_member)(a, m, &memory);
  NAME(pack)(&taken.x, a->x, a->norm, a->eps, m);
  if (a->router) {
    NAME(router_logits)(a, &taken.x, m);
    wait_for_team();
    NAME(route_tokens)(a, m);
    wait_for_team();
  }
  if (!NAME(given)(&a->gate) && !NAME(given)(&a->shared_gate)) return 0;
  if (NAME(given)(&a->gate))
    NAME(group_pairs)(a, &taken.dispatch);
  else
    taken.dispatch.start[0] = 0;
  NAME(hidden_rows)(a, &taken, m);
  wait_for_team();
  range mine = share(a->size, BLOCK, m);
  for (int64_t row = mine.first; row < mine.end; row += BLOCK) NAME(down_rows)(a, &taken, row);
  return 0;
}
