// Rows of the cache in 8-bit codes: ops/compressed.py says how they lie, and its bytes and these are the same.
//
// A row is `coded` codes, then a float32 scale for each `tile` of them, then `kept` values in bfloat16.
#ifndef FINBACK_CODES_H
#define FINBACK_CODES_H

#include <float.h>

#include "vectors.h"

enum { PLAIN, INT8, E4M3 };  // formats of rows

typedef struct {
  int64_t format, coded, tile, kept;
} layout;

typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef int8_t signed_bytes __attribute__((vector_size(LANES)));

INLINE vector splat_bits(uint32_t bits) { return (vector)((words){0} + bits); }

// LANES int8 codes as numbers.
INLINE vector load_int8(const uint8_t *from) {
#if LANES == 16
  return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
  signed_bytes codes;
  memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(__builtin_convertvector(codes, integers), vector);
#endif
}

// LANES E4M3 codes as numbers. Exponent and mantissa are those of a wider format whose exponents are larger by a constant, so that
// one multiplication is left, which is exact, subnormal codes included. The code of nan becomes 480: its tile's scale is not finite.
INLINE vector load_e4m3(const uint8_t *from) {
#if LANES == 16
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
  return (vector)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbf80))) * 0x1p8f;
#else
  bytes codes;
  memcpy(&codes, from, sizeof codes);
  words wide = __builtin_convertvector(codes, words);
  vector magnitude = (vector)((wide & 0x7f) << 20) * 0x1p120f;
  return (vector)((words)magnitude | (wide & 0x80) << 24);
#endif
}

INLINE vector load_part_code(const uint8_t *from, int64_t count, int64_t format) {
  uint8_t part[LANES] = {0};
  if (count < LANES) from = memcpy(part, from, count);
  return format == INT8 ? load_int8(from) : load_e4m3(from);
}

// Numbers of at most 127 to the nearest int8, those of at most 448 to the nearest E4M3, ties to even, in the low byte of each word.
INLINE words int8_words(vector value) {
  const vector round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no place for a fraction
  return (words)__builtin_convertvector(value + round - round, integers);
}

INLINE words e4m3_words(vector value) {
  const vector subnormal = splat(0x1p14f);  // adding it leaves the place of a subnormal code, 2^-9, as the last
  words bits = (words)value & 0x7fffffff, sign = (words)value >> 24 & 0x80;
  words below = (words)((vector)bits + subnormal) - (words)subnormal;
  words normal = (bits + ((bits >> 20) & 1) + 0x7ffff - (120u << 23)) >> 20;
  vector code = where((vector)bits < 0x1p-6f, (vector)below, (vector)normal);
  return (words)where(value == value, code, splat_bits(0x7f)) | sign;
}

// `coded` and then `kept` numbers to a row. A tile of zeros gets the smallest normal scale; one with inf or nan a scale that is not
// finite.
static void encode_row(const layout *l, const float *from, uint8_t *to) {
  const float limit = l->format == INT8 ? 127.0f : 448.0f;
  uint8_t *scales = to + l->coded, *kept = scales + l->coded / l->tile * sizeof(float);
  for (int64_t first = 0; first < l->coded; first += l->tile) {
    vector highest = {0};
    for (int64_t i = 0; i < l->tile; i += LANES) {
      vector value = load_part_float32(from + first + i, l->tile - i);
      vector magnitude = (vector)((words)value & 0x7fffffff);
      highest = where((magnitude > highest) | (magnitude != magnitude), magnitude, highest);  // nan stays
    }
    float scale = highest[0];
    for (int lane = 1; lane < LANES; lane++)
      if (highest[lane] > scale || highest[lane] != highest[lane]) scale = highest[lane];
    scale /= limit;
    if (scale < FLT_MIN) scale = FLT_MIN;
    memcpy(scales + first / l->tile * sizeof scale, &scale, sizeof scale);
    for (int64_t i = 0; i < l->tile; i += LANES) {
      vector value = load_part_float32(from + first + i, l->tile - i) / scale;
      value = where(value > limit, splat(limit), where(value < -limit, splat(-limit), value));
      bytes codes = __builtin_convertvector(l->format == INT8 ? int8_words(value) : e4m3_words(value), bytes);
      memcpy(to + first + i, &codes, least(LANES, l->tile - i));
    }
  }
  for (int64_t i = 0; i < l->kept; i += LANES) {
    uint16_t part[LANES];
    store_bfloat16(part, load_part_float32(from + l->coded + i, l->kept - i));
    memcpy(kept + i * sizeof *part, part, least(LANES, l->kept - i) * sizeof *part);
  }
}

#endif
