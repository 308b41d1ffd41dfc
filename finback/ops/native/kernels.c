// The kernels of a decode step on a CPU: few tokens at a time, so that reading the weights is what takes the time.
//
// Compiled for the machine it runs on, on first use, by build.py; calls.py declares these functions to Python. Everything
// typed is written once and included for float32 (names end in _float32) and for bfloat16 (_bfloat16).
//
// A kernel is a function that every thread of a team runs with its own number. Nothing in it forks, so any number of
// kernels run one after the other in one parallel region: `run_program` is the only function that Python calls to compute.

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

#include "codes.h"
#include "vectors.h"
#include "company.h"

enum {
  PANEL = 16,  // tokens that are multiplied together when they are many
  PANELS = 2,  // panels that are multiplied together when there are many
  BLOCK = 16,  // rows of a matrix whose products are finished before the next ones are begun
};

// What is prefetched of the weights behind those that are multiplied: from far into the second-level cache, since the first holds too
// few requests to keep memory busy while weights are multiplied, and from there into the first. Not so far in matrices as short as
// those of experts, whose beginning nothing prefetches.
enum { NO_FETCH, FETCH, FETCH_SHORT };

// ---- threads

typedef struct {
  int64_t index, count;
} member;

#ifdef _OPENMP
#define TEAM(threads) PRAGMA(omp parallel num_threads((int)(threads)))
INLINE member this_member(void) { return (member){omp_get_thread_num(), omp_get_num_threads()}; }
INLINE void wait_for_team(void) {
#pragma omp barrier
}
#else
#define TEAM(threads)
INLINE member this_member(void) { return (member){0, 1}; }
INLINE void wait_for_team(void) {}
#endif

typedef struct {
  int64_t first, end;
} range;

// This member's part of `count` items, cut at multiples of `grain`.
INLINE range share(int64_t count, int64_t grain, member m) {
  int64_t grains = (count + grain - 1) / grain;
  return (range){least(count, grains * m.index / m.count * grain), least(count, grains * (m.index + 1) / m.count * grain)};
}

// Items of unequal cost lie one after the other on a line that is cut into equal shares: `mine` is one of those. Which of
// `count` items that begin at `start` and take `cost` each begin in it?
INLINE range items_within(range mine, int64_t start, int64_t count, int64_t cost) {
  int64_t first = most(0, mine.first - start + cost - 1) / cost, end = most(0, mine.end - start + cost - 1) / cost;
  return (range){least(count, first), least(count, end)};
}

// ---- memory

// Working memory is handed out from one block. Starting from nothing, the same calls say how much they need.
typedef struct {
  uintptr_t next;
} arena;

INLINE void *take(arena *memory, int64_t bytes) {
  uintptr_t taken = memory->next;
  memory->next += rounded_up(bytes, 64);
  return (void *)taken;
}

// The calling thread's own block, kept for its next call.
static arena reserve(size_t bytes) {
  static _Thread_local void *block = 0;
  static _Thread_local size_t size = 0;
  if (bytes > size) {
    free(block);
    size = bytes + bytes / 2;
    if (posix_memalign(&block, 64, size)) {
      fprintf(stderr, "finback: no memory for %zu bytes\n", size);
      abort();
    }
  }
  return (arena){(uintptr_t)block};
}

// ---- programs

// One kernel with its arguments. `run` returns 0, or, in every member alike, what is wrong with them.
typedef struct {
  int (*run)(const void *arguments, member m, arena memory);
  void (*take_memory)(const void *arguments, int64_t threads, arena *memory);  // or null
  const void *arguments;
} operation;

static _Thread_local company of_this_thread;

// Run operations one after the other; the first result that is not 0 ends that and is returned.
int run_program(const operation *operations, int64_t count, int64_t most_threads) {
  double begin = seconds(CLOCK_MONOTONIC), absent = 0;
  int64_t threads = members(&of_this_thread, most_threads, begin);
  size_t bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    arena needed = {0};
    if (operations[i].take_memory) operations[i].take_memory(operations[i].arguments, threads, &needed);
    bytes = needed.next > bytes ? needed.next : bytes;
  }
  arena memory = reserve(bytes);
  int result = 0;
  TEAM(threads) {
    member m = this_member();
    int status = 0;
    double had = threads > 1 ? seconds(CLOCK_THREAD_CPUTIME_ID) : 0;
    for (int64_t i = 0; i < count && status == 0; i++) {
      if (i > 0) wait_for_team();
      status = operations[i].run(operations[i].arguments, m, memory);
    }
    if (m.index == 0) result = status;
    if (threads > 1) {  // a member that waits does so awake: where less time was its own than has passed, it had no core
      double without = seconds(CLOCK_MONOTONIC) - begin - (seconds(CLOCK_THREAD_CPUTIME_ID) - had);
      PRAGMA(omp atomic)
      absent += without;
    }
  }
  if (threads > 1) {
    double now = seconds(CLOCK_MONOTONIC);
    judge(&of_this_thread, threads, now - begin, absent, now);
  }
  return result;
}

// ---- blocks of words

// from [tokens, words], rows `stride` apart -> to [panels][words][16], zeros where there is no token. `words` is a multiple
// of LANES. The team shares the work.
static void transpose_words(uint32_t *to, const uint32_t *from, int64_t tokens, int64_t count, int64_t stride, member m) {
  int64_t across = count / LANES, panels = (tokens + PANEL - 1) / PANEL;
  range mine = share(panels * across, 1, m);
  for (int64_t i = mine.first; i < mine.end; i++) {
    int64_t token = i / across * PANEL, k = i % across * LANES;
    uint32_t *block = to + token * count + k * PANEL;
    for (int64_t first = 0; first < PANEL; first += LANES) {
      words rows[LANES];
      UNROLL(16) for (int t = 0; t < LANES; t++) {
        rows[t] = (words){0};
        if (token + first + t < tokens) memcpy(&rows[t], from + (token + first + t) * stride + k, sizeof rows[t]);
      }
      transpose(rows);
      UNROLL(16) for (int t = 0; t < LANES; t++) memcpy(block + t * PANEL + first, &rows[t], sizeof rows[t]);
    }
  }
}

// A square of 16 x 16 floats, transposed in place.
static void transpose_square(float *square) {
  for (int i = 0; i < 16; i += LANES)
    for (int j = 0; j <= i; j += LANES) {
      words upper[LANES], lower[LANES];
      UNROLL(16) for (int t = 0; t < LANES; t++) {
        memcpy(&upper[t], square + (j + t) * 16 + i, sizeof upper[t]);
        memcpy(&lower[t], square + (i + t) * 16 + j, sizeof lower[t]);
      }
      transpose(upper);
      if (i != j) transpose(lower);
      UNROLL(16) for (int t = 0; t < LANES; t++) {
        memcpy(square + (i + t) * 16 + j, &upper[t], sizeof upper[t]);
        if (i != j) memcpy(square + (j + t) * 16 + i, &lower[t], sizeof lower[t]);
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
    vector x = load_part_float32(scores + e, experts - e);
    store_part_float32(scores + e, how->softmax ? exponential(x - highest) : 1.0f / (1.0f + exponential(-x)), experts - e);
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
#include "packed.h"
#include "operations.h"
#include "rows.h"
#include "attention.h"
#include "grouped_query.h"
#include "latent.h"
#include "experts.h"
#include "undefine.h"

#define BF16 1
#define NAME(name) name##_bfloat16
#include "product.h"
#include "packed.h"
#include "operations.h"
#include "rows.h"
#include "attention.h"
#include "grouped_query.h"
#include "latent.h"
#include "experts.h"

// ---- for tests

// `judge` and `members` on a state of the caller's.
void company_judge(company *state, int64_t threads, double ran, double absent, double now) { judge(state, threads, ran, absent, now); }
int64_t company_members(company *state, int64_t threads, double now) { return members(state, threads, now); }
