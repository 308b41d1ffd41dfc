// Vectors as GCC and Clang lay them over whatever registers the processor has, and the few functions of them that C lacks.
//
// A `vector` holds LANES floats. Nothing here names an instruction set but to choose that width: the same source becomes
// AVX-512, AVX2, NEON or SSE code. (The one instruction that is named, the bfloat16 dot product, is in product.h.)
#ifndef FINBACK_VECTORS_H
#define FINBACK_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float four __attribute__((vector_size(16)));

INLINE vector splat(float value) { return value - (vector){0}; }

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
  return (vector)(__builtin_convertvector(bits, words) << 16);
}

INLINE float float_of_bfloat16(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float result;
  memcpy(&result, &word, sizeof result);
  return result;
}

// Rounded to the nearest, ties to even, as torch does; nan stays nan.
INLINE uint16_t bfloat16_of_float(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  if (value != value) return 0x7fc0;
  return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Sums of the lanes of four vectors: halves are added until four lanes are left, then 4 x 4 is transposed and added.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE __builtin_shufflevector
#if LANES == 16
typedef float eight __attribute__((vector_size(32)));
INLINE four folded(vector v) {
  eight half = SHUFFLE(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return SHUFFLE(half, half, 0, 1, 2, 3) + SHUFFLE(half, half, 4, 5, 6, 7);
}
#elif LANES == 8
INLINE four folded(vector v) { return SHUFFLE(v, v, 0, 1, 2, 3) + SHUFFLE(v, v, 4, 5, 6, 7); }
#else
INLINE four folded(vector v) { return v; }
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
#else
INLINE float sum_of_lanes(vector v) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += v[lane];
  return sum;
}
INLINE four sums_of_lanes(vector a, vector b, vector c, vector d) {
  return (four){sum_of_lanes(a), sum_of_lanes(b), sum_of_lanes(c), sum_of_lanes(d)};
}
#endif

INLINE vector where(integers condition, vector yes, vector no) {
  return (vector)((condition & (integers)yes) | (~condition & (integers)no));
}

// e^x to about one unit in the last place: 2^n p(r) with n = round(x / ln 2) and a polynomial of degree 6 on the rest.
// Below -87 the result is 0 and above 88 infinity, so nothing is denormal; nan stays nan.
INLINE vector exponential(vector x) {
  const vector round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no place for a fraction
  vector n = x * 1.44269504088896341f + round - round;
  vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p *= (vector)((__builtin_convertvector(n, integers) + 127) << 23);
  p = where(x < -87.0f, splat(0.0f), p);
  return where(x > 88.0f, splat(INFINITY), p);
}

INLINE vector silu(vector x) { return x / (1.0f + exponential(-x)); }

#endif
