// Products with weights of 4 or 8 bits, unpacked in registers, for one type of activations: included twice, after product.h.
//
// The order in memory is that of ops/packed.py: a block of 16 rows has lines of 16 words, one row to a lane, and every byte is
// read once, in sequence. Where the processor multiplies pairs of bfloat16, a table turns nibbles into bfloat16: `permute` looks
// at the five lowest bits of each 16, so a table that repeats itself after 16 entries needs no mask, and four shifts make eight
// inputs of 16 rows. A byte is two nibbles, each with a table of its own: no product is rounded. Elsewhere the integers become
// floats. Either way the sum of a group meets its scale in float32.

// A matrix [rows, inputs] as it lies (`plain`), or packed.
typedef struct {
  const NAME(stored) * plain;
  const uint32_t *codes;            // [rows / 16][inputs * bits / 32][16]
  const uint16_t *scales, *shifts;  // float16 [rows / 16][groups][16]; no shifts where the grid is symmetric
  int64_t bits, group;              // group: inputs that share a scale
} NAME(matrix);

#ifndef FINBACK_HALVES
#define FINBACK_HALVES
// Finite float16, those below its normal range included.
INLINE vector load_float16(const uint16_t *from) {
  halves bits;
  memcpy(&bits, from, sizeof bits);
#if LANES == 16
  return (vector)_mm512_cvtph_ps((__m256i)bits);
#else
  words wide = __builtin_convertvector(bits, words);
  vector magnitude = (vector)((wide & 0x7fff) << 13) * 0x1p112f;
  return (vector)((words)magnitude | (wide & 0x8000) << 16);
#endif
}
#endif

#if PAIR == 2
// Bytes j and j + 2 of each word, less 128, as a pair of bfloat16: dearer than the tables, and it halves the products.
INLINE __m512i NAME(pair_of_bytes)(__m512i codes, int j) {
  __m512i centred = _mm512_xor_si512(codes, _mm512_set1_epi8((char)0x80));
  __m512i lower = _mm512_srai_epi32(_mm512_slli_epi32(centred, 24 - 8 * j), 24);
  __m512i upper = _mm512_srai_epi32(j ? centred : _mm512_slli_epi32(centred, 8), 24);
  __m512i low_float = (__m512i)_mm512_cvtepi32_ps(lower), high_float = (__m512i)_mm512_cvtepi32_ps(upper);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low_float, 16), high_float);
}
#endif

enum {
  NAME(AT_ONCE) = 8,         // most tokens that share what was unpacked
  NAME(LINES_AHEAD) = 128,   // of codes, which prefetching is ahead by
  NAME(IN_LINE) = BLOCK / LANES
};

// out[token * BLOCK + row] for one block of rows and 1, 2, 4 or 8 tokens. One or two tokens are added in several sums each, for
// an addition takes longer than all that lies between it and the next one to the same sum.
INLINE void NAME(packed_block)(const NAME(matrix) * weight, int64_t block, int64_t inputs, const NAME(packed) * const *x, int bits,
                               int shifted, int tokens, float *const *out) {
  const int in_line = 32 / bits, chains = PAIR == 2 && tokens <= 2 ? 4 / tokens : 1;
#if PAIR == 2
  const int products = bits == 8 && tokens >= 4 ? 2 : 4;  // of a line with each token
#endif
  const int64_t lines = weight->group / in_line, groups = inputs / weight->group;
  const uint32_t *line = weight->codes + block * groups * lines * BLOCK;
  const uint16_t *scales = weight->scales + block * groups * BLOCK, *shifts = weight->shifts + block * groups * BLOCK;
  vector total[NAME(AT_ONCE)][NAME(IN_LINE)] = {0};
#if PAIR == 2
  const integers nibble = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vector low_values = __builtin_convertvector(nibble, vector) - (bits == 4 ? 8.0f : 0.0f);
  const vector high_values = (__builtin_convertvector(nibble, vector) - 8.0f) * 16.0f;
  const __m512i low_table = (__m512i)_mm512_cvtne2ps_pbh((__m512)low_values, (__m512)low_values);
  const __m512i high_table = (__m512i)_mm512_cvtne2ps_pbh((__m512)high_values, (__m512)high_values);
  const __m512i ones = _mm512_set1_epi16(0x3f80);
#endif
  for (int64_t g = 0, k = 0; g < groups; g++) {
    vector sum[NAME(AT_ONCE)][4] = {0}, plain_sum[NAME(AT_ONCE)] = {0};
    __builtin_prefetch(scales + (g + 8) * BLOCK);
    for (int64_t l = 0; l < lines; l++, k += in_line, line += BLOCK) {
      __builtin_prefetch(line + NAME(LINES_AHEAD) * BLOCK, 0, 2);
#if PAIR == 2
      __m512i codes = _mm512_loadu_si512(line);
      UNROLL(4) for (int j = 0; j < products; j++) {
        __m512i w;
        if (products == 2) {
          w = NAME(pair_of_bytes)(codes, j);
        } else {
          __m512i places = j ? _mm512_srli_epi16(codes, 4 * j) : codes;
          w = _mm512_permutexvar_epi16(places, bits == 4 || j % 2 == 0 ? low_table : high_table);
        }
        int first = bits == 4 || products == 2 || j % 2 == 0;  // of the products with these activations
        int64_t at = k + (bits == 4 || products == 2 ? 2 * j : j / 2 * 2);
        UNROLL(8) for (int t = 0; t < tokens; t++) {
          __m512i values = NAME(broadcast)(x[t] + at);
          sum[t][j % chains] = MULTIPLY_ADD(sum[t][j % chains], w, values);
          if (shifted && first) plain_sum[t] = MULTIPLY_ADD(plain_sum[t], ones, values);
        }
      }
#else
      UNROLL(4) for (int p = 0; p < NAME(IN_LINE); p++) {
        words codes;
        memcpy(&codes, line + p * LANES, sizeof codes);
        UNROLL(8) for (int i = 0; i < in_line; i++) {
          integers value = (integers)(codes >> (bits * (i / 2) + 16 * (i % 2))) & ((1 << bits) - 1);
          vector w = __builtin_convertvector(value - (1 << (bits - 1)), vector);
          UNROLL(8) for (int t = 0; t < tokens; t++) {
            sum[t][p] += w * x[t][k + i];
            if (shifted && p == 0) plain_sum[t] += x[t][k + i];
          }
        }
      }
#endif
    }
    UNROLL(4) for (int p = 0; p < NAME(IN_LINE); p++) {
      vector scale = load_float16(scales + g * BLOCK + p * LANES);
      UNROLL(8) for (int t = 0; t < tokens; t++) {
        vector all = chains == 4 ? (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3])
                     : chains == 2 ? sum[t][0] + sum[t][1]
                                   : sum[t][p];
        if (shifted) all += load_float16(shifts + g * BLOCK + p * LANES) * plain_sum[t];
        total[t][p] += scale * all;
      }
    }
  }
  UNROLL(8) for (int t = 0; t < tokens; t++)
    UNROLL(4) for (int p = 0; p < NAME(IN_LINE); p++) store_float32(out[t] + p * LANES, total[t][p]);
}

// The same for any number of tokens, which are told by pointer. Where 3 or 5 to 7 are left, the last is computed again in the
// places that are free.
static void NAME(packed_dots)(const NAME(matrix) * weight, int64_t block, int64_t inputs, const NAME(packed) * const *x,
                              int64_t tokens, float *out) {
  for (int64_t m = 0; m < tokens; m += NAME(AT_ONCE)) {
    int64_t now = least(NAME(AT_ONCE), tokens - m);
    const NAME(packed) * from[NAME(AT_ONCE)];
    float *to[NAME(AT_ONCE)];
    for (int64_t t = 0; t < NAME(AT_ONCE); t++) from[t] = x[m + least(t, now - 1)], to[t] = out + (m + least(t, now - 1)) * BLOCK;
#define OF_TOKENS(bits, shifted)                                                      \
  if (now == 1)                                                                       \
    NAME(packed_block)(weight, block, inputs, from, bits, shifted, 1, to);            \
  else if (now == 2)                                                                  \
    NAME(packed_block)(weight, block, inputs, from, bits, shifted, 2, to);            \
  else if (now <= 4)                                                                  \
    NAME(packed_block)(weight, block, inputs, from, bits, shifted, 4, to);            \
  else                                                                                \
    NAME(packed_block)(weight, block, inputs, from, bits, shifted, 8, to);
    if (weight->bits == 4) {
      if (weight->shifts) {
        OF_TOKENS(4, 1)
      } else {
        OF_TOKENS(4, 0)
      }
    } else if (weight->shifts) {
      OF_TOKENS(8, 1)
    } else {
      OF_TOKENS(8, 0)
    }
#undef OF_TOKENS
  }
}

INLINE int NAME(given)(const NAME(matrix) * weight) { return weight->plain || weight->codes; }

// `product` for a matrix of either kind: its rows from `row`, a multiple of BLOCK, and up to BLOCK of them.
static void NAME(matrix_product)(const NAME(matrix) * weight, int64_t row, int64_t rows, const NAME(activations) * x,
                                 int64_t first, float *out) {
  if (weight->plain) {
    NAME(product)(weight->plain + row * x->inputs, rows, x, first, out);
    return;
  }
  const NAME(packed) * pointers[PANELS * PANEL];
  int64_t tokens = NAME(tokens_now)(x, first);
  for (int64_t t = 0; t < tokens; t++) pointers[t] = x->rows + (first + t) * x->padded;
  NAME(packed_dots)(weight, row / BLOCK, x->inputs, pointers, tokens, out);
}
