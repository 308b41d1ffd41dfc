// Cached rows, plain or in codes, for one stored type: included twice, after operations.h.

typedef struct {
  uint8_t *rows;               // [blocks, block_rows, row_bytes]
  const int32_t *blocks;       // [tokens, blocks_per_sequence]: the blocks of each; null where it has one, of its own number
  const int64_t *positions;    // [tokens]: each token's own, the last one that it looks at
  const float *cosine, *sine;  // [positions, rotated values / 2]
  int64_t tokens, width, row_bytes, blocks_per_sequence, block_rows;
  layout layout;  // of a row; plain: `width` values as they are stored
} NAME(cache);

INLINE uint8_t *NAME(cached_row)(const NAME(cache) * c, int64_t token, int64_t position) {
  int64_t block = token, within = position;
  if (c->blocks) {
    block = c->blocks[token * c->blocks_per_sequence + position / c->block_rows];
    within = position % c->block_rows;
  }
  return c->rows + (block * c->block_rows + within) * c->row_bytes;
}

// A new row of `width` values, written as the cache holds it.
static void NAME(write_row)(const NAME(cache) * c, const NAME(stored) * from, uint8_t *to) {
  float values[c->width];
  if (c->layout.format == PLAIN) {
    memcpy(to, from, c->width * sizeof *from);
    return;
  }
  for (int64_t i = 0; i < c->width; i += LANES)
    store_part_float32(values + i, LOAD_PART(from + i, c->width - i), c->width - i);
  encode_row(&c->layout, values, to);
}

// `count` codes with one scale as values, each rounded once.
INLINE void NAME(decode_tile)(const uint8_t *codes, float scale, int64_t count, int64_t format, NAME(stored) * to) {
  int64_t i = 0;
#if PAIR == 2
  for (; i + STEP <= count; i += STEP) {
    vector low = format == INT8 ? load_int8(codes + i) : load_e4m3(codes + i);
    vector high = format == INT8 ? load_int8(codes + i + LANES) : load_e4m3(codes + i + LANES);
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)(high * scale), (__m512)(low * scale)));
  }
#endif
  for (; i < count; i += LANES) STORE_PART(to + i, load_part_code(codes + i, count - i, format) * scale, count - i);
}

// Columns [first, end) of `count` rows that follow each other, as values [count, stride]: what ops/compressed.py's decode gives.
static void NAME(decode_rows)(const NAME(cache) * c, const uint8_t *row, int64_t count, range columns, NAME(stored) * to,
                              int64_t stride) {
  const layout l = c->layout;
  int64_t coded_end = least(columns.end, l.coded), first_tile = columns.first / l.tile;
  for (int64_t s = 0; s < count; s++, row += c->row_bytes, to += stride) {
    const uint8_t *scales = row + l.coded, *kept = scales + l.coded / l.tile * sizeof(float);
    int64_t column = columns.first;
    for (int64_t tile = first_tile; column < coded_end; tile++) {
      int64_t end = least(coded_end, (tile + 1) * l.tile);
      float scale;
      memcpy(&scale, scales + tile * sizeof scale, sizeof scale);
      if (l.format == INT8)
        NAME(decode_tile)(row + column, scale, end - column, INT8, to + column - columns.first);
      else
        NAME(decode_tile)(row + column, scale, end - column, E4M3, to + column - columns.first);
      column = end;
    }
    if (column >= columns.end) continue;
    kept += (column - l.coded) * sizeof(uint16_t);
#if BF16
    memcpy(to + column - columns.first, kept, (columns.end - column) * sizeof *to);
#else
    for (; column < columns.end; column++, kept += sizeof(uint16_t)) {
      uint16_t value;
      memcpy(&value, kept, sizeof value);
      to[column - columns.first] = float_of_bfloat16(value);
    }
#endif
  }
}
