// Feed-forward of a decode step, for one stored type: included twice, after product.h.
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
  const NAME(stored) * gate, *up, *down;     // [experts, width, size] twice, [experts, size, width]; or null
  const NAME(stored) * shared_gate, *shared_up, *shared_down;  // [shared_width, size] twice, [size, shared_width]; or null
  int64_t tokens, size, experts, choices, groups, kept_groups, width, shared_width, threads;
  int64_t softmax, two_per_group, normalise;  // booleans
  float scaling, eps;
} NAME(feed_forward_arguments);

// Token-choice pairs in expert order.
typedef struct {
  int64_t *start;    // [experts + 1]: the first pair of each expert
  int64_t *pair;     // [tokens * choices]: token * choices + choice
  int64_t *touched;  // [count]: experts with tokens
  int64_t count;
} NAME(dispatch);

static NAME(dispatch) NAME(new_dispatch)(const NAME(feed_forward_arguments) * a) {
  int64_t experts = a->gate ? a->experts : 0, pairs = a->tokens * a->choices;
  NAME(dispatch) d = {allocate((2 * experts + 1 + pairs) * sizeof(int64_t)), 0, 0, 0};
  d.pair = d.start + experts + 1;
  d.touched = d.pair + (a->gate ? pairs : 0);
  return d;
}

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
  float block[BLOCK * PANEL];
  for (int64_t row = mine.first; row < mine.end; row += BLOCK)
    for (int64_t first = 0; first < a->tokens; first += PANEL) {
      int64_t count = least(BLOCK, mine.end - row);
      NAME(product)(a->router + row * a->size, count, x, first, block);
      for (int64_t t = 0; t < least(PANEL, a->tokens - first); t++)
        for (int64_t r = 0; r < count; r++) a->scores[(first + t) * a->experts + row + r] = block[r * PANEL + t];
    }
}

static void NAME(route_tokens)(const NAME(feed_forward_arguments) * a, member m) {
  routing how = {a->experts, a->choices, a->groups, a->kept_groups, a->softmax, a->two_per_group, a->normalise, a->scaling};
  range mine = share(a->tokens, 1, m);
  for (int64_t t = mine.first; t < mine.end; t++)
    choose_experts(&how, a->scores + t * a->experts, a->bias, a->indices + t * a->choices, a->values + t * a->choices);
}

// ---- experts

// hidden[m][rows] = silu(gate x) * up x * weight, for rows [first, first + count) of one expert and the tokens of x.
static void NAME(activate)(const float *gate, const float *up, int64_t count, int64_t tokens, const float *weights,
                           NAME(packed) * const *hidden) {
  enum { PARTS = PANEL / LANES };
  vector weight[PARTS];
  float products[PANEL];
  for (int p = 0; p < PARTS; p++) weight[p] = load_float32(weights + p * LANES);
  for (int64_t r = 0; r < count; r++) {
    for (int p = 0; p < PARTS; p++) {
      vector g = load_float32(gate + r * PANEL + p * LANES), u = load_float32(up + r * PANEL + p * LANES);
      store_float32(products + p * LANES, silu(g) * u * weight[p]);
    }
    for (int64_t m = 0; m < tokens; m++) hidden[m][r] = TO_PACKED(products[m]);
  }
}

// One block of rows of one routed expert: its gate and up products for all of its tokens.
static void NAME(routed_rows)(const NAME(feed_forward_arguments) * a, const NAME(dispatch) * d, int64_t expert, int64_t row,
                              const NAME(activations) * x, const NAME(activations) * hidden) {
  int64_t count = least(BLOCK, a->width - row), at = (expert * a->width + row) * a->size;
  float gate[BLOCK * PANEL] = {0}, up[BLOCK * PANEL] = {0}, weights[PANEL] = {0};
  for (int64_t first = d->start[expert]; first < d->start[expert + 1]; first += PANEL) {
    int64_t tokens = least(PANEL, d->start[expert + 1] - first);
    const NAME(packed) * from[PANEL];
    NAME(packed) * to[PANEL];
    for (int64_t m = 0; m < tokens; m++) {
      int64_t pair = d->pair[first + m];
      from[m] = x->rows + pair / a->choices * x->padded;
      to[m] = hidden->rows + (first + m) * hidden->padded + row;
      weights[m] = a->values[pair];
    }
    NAME(all_dots)(a->gate + at, a->size, from, a->size, count, tokens, gate);
    NAME(all_dots)(a->up + at, a->size, from, a->size, count, tokens, up);
    NAME(activate)(gate, up, count, tokens, weights, to);
  }
}

static void NAME(shared_rows)(const NAME(feed_forward_arguments) * a, int64_t row, const NAME(activations) * x,
                              const NAME(activations) * hidden) {
  int64_t count = least(BLOCK, a->shared_width - row);
  float gate[BLOCK * PANEL] = {0}, up[BLOCK * PANEL] = {0}, weights[PANEL];
  for (int m = 0; m < PANEL; m++) weights[m] = 1.0f;
  for (int64_t first = 0; first < a->tokens; first += PANEL) {
    int64_t tokens = least(PANEL, a->tokens - first);
    NAME(packed) * to[PANEL];
    for (int64_t m = 0; m < tokens; m++) to[m] = hidden->rows + (first + m) * hidden->padded + row;
    NAME(product)(a->shared_gate + row * a->size, count, x, first, gate);
    NAME(product)(a->shared_up + row * a->size, count, x, first, up);
    NAME(activate)(gate, up, count, tokens, weights, to);
  }
}

// Output values [row, row + BLOCK) of all tokens: the sum over experts in their order, then shared experts and residual.
static void NAME(down_rows)(const NAME(feed_forward_arguments) * a, const NAME(dispatch) * d, int64_t row,
                            const NAME(activations) * routed, const NAME(activations) * shared, float *sums) {
  int64_t count = least(BLOCK, a->size - row);
  float block[BLOCK * PANEL];
  memset(sums, 0, a->tokens * BLOCK * sizeof *sums);
  for (int64_t i = 0; i < d->count; i++) {
    int64_t expert = d->touched[i];
    for (int64_t first = d->start[expert]; first < d->start[expert + 1]; first += PANEL) {
      int64_t tokens = least(PANEL, d->start[expert + 1] - first);
      const NAME(packed) * from[PANEL];
      for (int64_t m = 0; m < tokens; m++) from[m] = routed->rows + (first + m) * routed->padded;
      NAME(all_dots)(a->down + (expert * a->size + row) * a->width, a->width, from, a->width, count, tokens, block);
      for (int64_t m = 0; m < tokens; m++) {
        float *sum = sums + d->pair[first + m] / a->choices * BLOCK;
        for (int64_t r = 0; r < count; r++) sum[r] += block[r * PANEL + m];
      }
    }
  }
  for (int64_t first = 0; a->shared_gate && first < a->tokens; first += PANEL) {
    NAME(product)(a->shared_down + row * a->shared_width, count, shared, first, block);
    for (int64_t m = 0; m < least(PANEL, a->tokens - first); m++)
      for (int64_t r = 0; r < count; r++) sums[(first + m) * BLOCK + r] += block[r * PANEL + m];
  }
  for (int64_t t = 0; t < a->tokens; t++)
    for (int64_t r = 0; r < count; r++) {
      int64_t at = t * a->size + row + r;
      a->output[at] = FROM_FLOAT(sums[t * BLOCK + r] + (a->residual ? TO_FLOAT(a->residual[at]) : 0.0f));
    }
}

// 0, or 1 if an index that was given is not that of an expert.
int NAME(feed_forward)(const NAME(feed_forward_arguments) * a) {
  if (a->gate && !a->router)
    for (int64_t i = 0; i < a->tokens * a->choices; i++)
      if (a->indices[i] < 0 || a->indices[i] >= a->experts) return 1;
  int64_t shared_width = a->shared_gate ? a->shared_width : 0, pairs = a->gate ? a->tokens * a->choices : 0;
  NAME(activations) x = NAME(new_activations)(a->tokens, a->size);
  NAME(activations) routed = NAME(new_activations)(pairs, a->width), shared = NAME(new_activations)(a->tokens, shared_width);
  memset(routed.rows, 0, pairs * routed.padded * sizeof *routed.rows);
  memset(shared.rows, 0, a->tokens * shared.padded * sizeof *shared.rows);
  NAME(dispatch) d = NAME(new_dispatch)(a);
  int64_t routed_blocks = (a->width + BLOCK - 1) / BLOCK, shared_blocks = (shared_width + BLOCK - 1) / BLOCK;
  TEAM(a->threads) {
    member m = this_member();
    NAME(pack)(&x, a->x, a->norm, a->eps, m);
    if (a->router) {
      NAME(router_logits)(a, &x, m);
      wait_for_team();
      NAME(route_tokens)(a, m);
      wait_for_team();
    }
    if (a->gate || a->shared_gate) {
      if (a->gate) {
        if (m.index == 0) NAME(group_pairs)(a, &d);
        wait_for_team();
      }
      // Whoever is free takes the next block: experts have unequal numbers of tokens. Who computes it changes nothing.
      EACH_TAKEN_BY_ONE for (int64_t i = 0; i < d.count * routed_blocks + shared_blocks; i++) {
        if (i < shared_blocks)
          NAME(shared_rows)(a, i * BLOCK, &x, &shared);
        else
          NAME(routed_rows)(a, &d, d.touched[(i - shared_blocks) / routed_blocks],
                            (i - shared_blocks) % routed_blocks * BLOCK, &x, &routed);
      }
      if (shared.tokens > MOST_DOTS) {
        transpose_words((uint32_t *)shared.panels, (const uint32_t *)shared.rows, a->tokens, shared.padded / PAIR, m);
        wait_for_team();
      }
      float *sums = allocate(a->tokens * BLOCK * sizeof *sums);
      EACH_TAKEN_BY_ONE for (int64_t row = 0; row < a->size; row += BLOCK) NAME(down_rows)(a, &d, row, &routed, &shared, sums);
      free(sums);
    }
  }
  free(d.start);
  free(shared.rows);
  free(routed.rows);
  free(x.rows);
  return 0;
}
