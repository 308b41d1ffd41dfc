// Vectors as GCC and Clang lay them over whatever registers the processor has, and the few functions of them that C lacks.
//
// A `vector` holds LANES floats: the same source becomes AVX-512, AVX2, NEON or SSE code. An instruction set is named for three
// things only: that width, the bfloat16 dot product (in product.h), and widening, which GCC does in halves.
#ifndef FINBACK_VECTORS_H
#define FINBACK_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define UNROLL(most) PRAGMA(GCC unroll most)

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float four __attribute__((vector_size(16)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t rounded_up(int64_t count, int64_t grain) { return (count + grain - 1) / grain * grain; }

INLINE vector splat(float value) { return value - (vector){0}; }

// sum + a b, rounded once where the processor can: of the compiler's own choice one copy of a loop is rounded once and another twice.
INLINE vector multiply_add(vector sum, vector a, vector b) {
#if LANES == 8 && defined(__FMA__)
  return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

INLINE vector where(integers condition, vector yes, vector no) {
  return (vector)((condition & (integers)yes) | (~condition & (integers)no));
}

// Loaded once and kept: the compiler would sooner load it again for every use, and loads are what is scarce.
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(value) __asm__("" : "+v"(value))
#elif defined(__aarch64__)
#define KEEP_IN_REGISTER(value) __asm__("" : "+w"(value))
#else
#define KEEP_IN_REGISTER(value)
#endif

// ---- in and out of memory: whole vectors, and the first `count` lanes where there are no more

INLINE vector load_float32(const float *from) {
  vector result;
  memcpy(&result, from, sizeof result);
  return result;
}

INLINE void store_float32(float *to, vector value) { memcpy(to, &value, sizeof value); }

// bfloat16 is the upper half of a float32.
INLINE vector load_bfloat16(const uint16_t *from) {
  halves bits;
  memcpy(&bits, from, sizeof bits);
#if LANES == 16
  return (vector)((words)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
  return (vector)(__builtin_convertvector(bits, words) << 16);
#endif
}

// Rounded to the nearest, ties to even, as torch does; nan stays nan. In the lower half of each word.
INLINE words bfloat16_words(vector value) {
  words bits = (words)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (words)where(value == value, (vector)rounded, (vector)((words){0} + 0x7fc0));
}

INLINE void store_bfloat16(uint16_t *to, vector value) {
  halves bits = __builtin_convertvector(bfloat16_words(value), halves);
  memcpy(to, &bits, sizeof bits);
}

INLINE float float_of_bfloat16(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float result;
  memcpy(&result, &word, sizeof result);
  return result;
}

#define PART_OF(type, name, loaded, stored)                             \
  INLINE vector load_part_##name(const type *from, int64_t count) {     \
    if (count >= LANES) return loaded(from);                            \
    type part[LANES] = {0};                                             \
    memcpy(part, from, count * sizeof *from);                           \
    return loaded(part);                                                \
  }                                                                     \
  INLINE void store_part_##name(type *to, vector value, int64_t count) { \
    if (count >= LANES) {                                               \
      stored(to, value);                                                \
      return;                                                           \
    }                                                                   \
    type part[LANES];                                                   \
    stored(part, value);                                                \
    memcpy(to, part, count * sizeof *to);                               \
  }
PART_OF(float, float32, load_float32, store_float32)
PART_OF(uint16_t, bfloat16, load_bfloat16, store_bfloat16)
#undef PART_OF

// ---- across lanes

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE __builtin_shufflevector

// Halves are added until four lanes are left, then 4 x 4 is transposed and added.
#if LANES == 16
typedef float eight __attribute__((vector_size(32)));
INLINE four folded(vector v) {
  eight half = SHUFFLE(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return SHUFFLE(half, half, 0, 1, 2, 3) + SHUFFLE(half, half, 4, 5, 6, 7);
}
#define LOW_LANES(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_LANES(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
INLINE four folded(vector v) { return SHUFFLE(v, v, 0, 1, 2, 3) + SHUFFLE(v, v, 4, 5, 6, 7); }
#define LOW_LANES(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_LANES(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
INLINE four folded(vector v) { return v; }
#define LOW_LANES(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH_LANES(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

INLINE four sums_of_lanes(vector a, vector b, vector c, vector d) {
  four p = folded(a), q = folded(b), r = folded(c), s = folded(d);
  four pq = SHUFFLE(p, q, 0, 4, 1, 5) + SHUFFLE(p, q, 2, 6, 3, 7);  // p0+p2, q0+q2, p1+p3, q1+q3
  four rs = SHUFFLE(r, s, 0, 4, 1, 5) + SHUFFLE(r, s, 2, 6, 3, 7);
  return SHUFFLE(pq, rs, 0, 1, 4, 5) + SHUFFLE(pq, rs, 2, 3, 6, 7);
}

INLINE float sum_of_lanes(vector v) {
  four part = folded(v);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

// Rows become columns: interleaving the first half of the rows with the second, as often as LANES can be halved.
INLINE void transpose(words rows[LANES]) {
  UNROLL(4) for (int halved = 1; halved < LANES; halved *= 2) {
    words next[LANES];
    UNROLL(8) for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = LOW_LANES(rows[i], rows[i + LANES / 2]);
      next[2 * i + 1] = HIGH_LANES(rows[i], rows[i + LANES / 2]);
    }
    UNROLL(16) for (int i = 0; i < LANES; i++) rows[i] = next[i];
  }
}
#else
INLINE float sum_of_lanes(vector v) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += v[lane];
  return sum;
}

INLINE four sums_of_lanes(vector a, vector b, vector c, vector d) {
  return (four){sum_of_lanes(a), sum_of_lanes(b), sum_of_lanes(c), sum_of_lanes(d)};
}

INLINE void transpose(words rows[LANES]) {
  words columns[LANES];
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) columns[j][i] = rows[i][j];
  memcpy(rows, columns, sizeof columns);
}
#endif

// The sums of lanes of 4 x 4 vectors, added in the same order as above, four to each place in `to`.
INLINE void store_sums_of_lanes(vector v[4][4], float *const to[4]) {
#if defined(SHUFFLE) && LANES == 16
#define HALVES(a, b)                                                          \
  SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +     \
      SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define QUARTERS(a, b)                                                        \
  SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +   \
      SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define PAIRS(a, b)                                                           \
  SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +   \
      SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LANES_OF_PAIRS(a, b)                                                  \
  SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +   \
      SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
  vector four_lanes[4];  // are left of each vector: [i] holds them of v[0][i] to v[3][i]
  UNROLL(4) for (int i = 0; i < 4; i++) four_lanes[i] = QUARTERS((HALVES(v[0][i], v[1][i])), (HALVES(v[2][i], v[3][i])));
  vector p = PAIRS(four_lanes[0], four_lanes[1]), q = PAIRS(four_lanes[2], four_lanes[3]), sums = LANES_OF_PAIRS(p, q);
  UNROLL(4) for (int m = 0; m < 4; m++) memcpy(to[m], (float *)&sums + 4 * m, sizeof(four));
#undef HALVES
#undef QUARTERS
#undef PAIRS
#undef LANES_OF_PAIRS
#else
  for (int m = 0; m < 4; m++) {
    four sums = sums_of_lanes(v[m][0], v[m][1], v[m][2], v[m][3]);
    memcpy(to[m], &sums, sizeof sums);
  }
#endif
}

INLINE vector larger(vector a, vector b) { return where(a > b, a, b); }

INLINE float largest_lane(vector v) {
#if defined(SHUFFLE) && LANES == 16
  v = larger(v, SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return v[0] > v[1] ? v[0] : v[1];
#else
  float largest = v[0];
  for (int lane = 1; lane < LANES; lane++) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

// ---- functions

// e^x to about one unit in the last place: 2^n p(r) with n = round(x / ln 2) and a polynomial of degree 6 on the rest.
// Below -87 the result is 0 and above 88 infinity, so nothing is denormal; nan stays nan.
INLINE vector exponential(vector x) {
  const vector round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no place for a fraction
  vector n = multiply_add(round, x, splat(1.44269504088896341f)) - round;
  vector r = multiply_add(multiply_add(x, n, splat(-0.693359375f)), n, splat(2.12194440e-4f));  // ln 2 in two parts, the first of few bits
  vector p = splat(1.9875691500e-4f);
  p = multiply_add(splat(1.3981999507e-3f), p, r);
  p = multiply_add(splat(8.3334519073e-3f), p, r);
  p = multiply_add(splat(4.1665795894e-2f), p, r);
  p = multiply_add(splat(1.6666665459e-1f), p, r);
  p = multiply_add(splat(5.0000001201e-1f), p, r);
  p = multiply_add(r, p * r, r) + 1.0f;
  p *= (vector)((__builtin_convertvector(n, integers) + 127) << 23);
  p = where(x < -87.0f, splat(0.0f), p);
  return where(x > 88.0f, splat(INFINITY), p);
}

INLINE vector silu(vector x) { return x / (1.0f + exponential(-x)); }

#endif
