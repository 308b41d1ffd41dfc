// The kernels of a decode step on a CPU: few tokens at a time, so that reading the weights is what takes the time.
//
// Compiled for the machine it runs on, on first use, by build.py, which also declares these functions to Python. Everything
// typed is written once and included for float32 (names end in _float32) and for bfloat16 (_bfloat16).

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vectors.h"

enum {
  PANEL = 16,      // tokens that are multiplied together when they are many
  MOST_DOTS = 8,   // tokens up to which they are not
  BLOCK = 16,      // rows of a matrix whose products are finished before the next ones are begun
};

#define PRAGMA(text) _Pragma(#text)
#define UNROLL(most) PRAGMA(GCC unroll most)

// ---- threads

#ifdef _OPENMP
#define TEAM(threads) PRAGMA(omp parallel num_threads((int)(threads)))
#define EACH_TAKEN_BY_ONE PRAGMA(omp for schedule(dynamic))
INLINE void wait_for_team(void) {
#pragma omp barrier
}
#else
#define TEAM(threads)
#define EACH_TAKEN_BY_ONE
INLINE void wait_for_team(void) {}
#endif

typedef struct {
  int64_t index, count;
} member;

INLINE member this_member(void) {
#ifdef _OPENMP
  return (member){omp_get_thread_num(), omp_get_num_threads()};
#else
  return (member){0, 1};
#endif
}

typedef struct {
  int64_t first, end;
} range;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// This member's part of `count` items, cut at multiples of `grain`.
INLINE range share(int64_t count, int64_t grain, member m) {
  int64_t grains = (count + grain - 1) / grain;
  return (range){least(count, grains * m.index / m.count * grain), least(count, grains * (m.index + 1) / m.count * grain)};
}

// ---- memory

static void *allocate(size_t bytes) {
  void *memory = 0;
  if (posix_memalign(&memory, 64, bytes + 64)) {
    fprintf(stderr, "finback: no memory for %zu bytes\n", bytes);
    abort();
  }
  return memory;
}

// from [tokens, words] -> to [panels][words][16], zeros where there is no token.
static void transpose_words(uint32_t *to, const uint32_t *from, int64_t tokens, int64_t words, member m) {
  range mine = share(words, 16, m);
  for (int64_t first = 0; first < tokens; first += PANEL, to += PANEL * words, from += PANEL * words) {
    int64_t now = least(PANEL, tokens - first);
    for (int64_t k = mine.first; k < mine.end; k++) {
      for (int64_t t = 0; t < now; t++) to[k * PANEL + t] = from[t * words + k];
      for (int64_t t = now; t < PANEL; t++) to[k * PANEL + t] = 0;
    }
  }
}

// ---- router (V3 section 2.1.2)

typedef struct {
  int64_t experts, choices, groups, kept_groups, softmax, two_per_group, normalise;
  float scaling;
} routing;

// The open candidate with the largest value, the first of equals.
static int64_t best(const float *values, const unsigned char *open, int64_t count) {
  int64_t found = -1;
  for (int64_t i = 0; i < count; i++)
    if (open[i] && (found < 0 || values[i] > values[found])) found = i;
  return found;
}

// Logits [experts] become scores; the chosen experts' indices and values [choices], the best first.
static void choose_experts(const routing *how, float *scores, const float *bias, int64_t *indices, float *values) {
  int64_t experts = how->experts, per_group = experts / how->groups;
  float highest = scores[0], sum = 0;
  for (int64_t e = 1; e < experts; e++) highest = scores[e] > highest ? scores[e] : highest;
  for (int64_t e = 0; e < experts; e += LANES) {
    float part[LANES] = {0};
    int64_t now = least(LANES, experts - e);
    memcpy(part, scores + e, now * sizeof *part);
    vector x = load_float32(part);
    store_float32(part, how->softmax ? exponential(x - highest) : 1.0f / (1.0f + exponential(-x)));
    memcpy(scores + e, part, now * sizeof *part);
  }
  if (how->softmax) {
    for (int64_t e = 0; e < experts; e++) sum += scores[e];
    for (int64_t e = 0; e < experts; e++) scores[e] /= sum;
  }
  float choice[experts], of_group[how->groups];
  unsigned char open[experts], open_group[how->groups];
  for (int64_t e = 0; e < experts; e++) choice[e] = scores[e] + (bias ? bias[e] : 0.0f);
  memset(open, how->kept_groups == how->groups, sizeof open);
  if (how->kept_groups < how->groups) {
    memset(open_group, 1, sizeof open_group);
    for (int64_t g = 0; g < how->groups; g++) {
      float first = -INFINITY, second = -INFINITY;
      for (int64_t e = g * per_group; e < (g + 1) * per_group; e++) {
        second = choice[e] > first ? first : choice[e] > second ? choice[e] : second;
        first = choice[e] > first ? choice[e] : first;
      }
      of_group[g] = how->two_per_group ? first + second : first;
    }
    for (int64_t kept = 0; kept < how->kept_groups; kept++) {
      int64_t g = best(of_group, open_group, how->groups);
      open_group[g] = 0;
      memset(open + g * per_group, 1, per_group);
    }
  }
  float total = 0;
  for (int64_t k = 0; k < how->choices; k++) {
    int64_t e = best(choice, open, experts);
    open[e] = 0;
    indices[k] = e;
    values[k] = scores[e];
    total += scores[e];
  }
  for (int64_t k = 0; k < how->choices; k++)
    values[k] = (how->normalise ? values[k] / (total + 1e-20f) : values[k]) * how->scaling;
}

// ---- everything typed

#define BF16 0
#define NAME(name) name##_float32
#include "product.h"
#include "operations.h"
#include "experts.h"
#include "undefine.h"

#define BF16 1
#define NAME(name) name##_bfloat16
#include "product.h"
#include "operations.h"
#include "experts.h"
