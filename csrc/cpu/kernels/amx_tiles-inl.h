// AMX's tiles: eight registers of 16 rows of 64 bytes. Included by the source files of instruction sets with
// AMX.

constexpr int kTileRows = 16;
constexpr int kTilePairs = 16;  // of bf16 numbers, in a tile's row
constexpr int kTileBytes = kTileRows * kTilePairs * 4;

// Tiles can be used between these two calls. All have their full size.
inline void begin_tiles() {
  struct alignas(64) Config {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static constexpr Config config = [] {
    Config c;
    for (int i = 0; i < 8; ++i) {
      c.row_bytes[i] = kTilePairs * 4;
      c.rows[i] = kTileRows;
    }
    return c;
  }();
  asm volatile("ldtilecfg %0" : : "m"(config));
}
// Registers that are in use would be saved at each change of thread.
inline void end_tiles() {
  asm volatile("tilerelease");
}

// (GCC's intrinsics do not tell the compiler that tiles are loaded from and stored to memory.)
struct Tiles {
  template <int tile>
  LEAN_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  // Rows are `stride` bytes apart.
  template <int tile>
  LEAN_INLINE static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  LEAN_INLINE static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
  }
  // sum[i][j] += left[i][2k] * right[k][2j] + left[i][2k + 1] * right[k][2j + 1] for all k.
  template <int sum, int left, int right>
  LEAN_INLINE static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
  }
};

// Transposes 16 rows of 16 words in place; the rows are `stride` words apart.
inline void transpose(float* words, int64_t stride) {
  __m512i a[16], b[16];
  unrolled<16>([&](auto i) LEAN_INLINE { a[i] = _mm512_loadu_si512(words + stride * i); });
  unrolled<8>([&](auto i) LEAN_INLINE {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  // a[4j + k] has in its 128-bit block c column 4c + k of rows 4j to 4j + 3.
  unrolled<4>([&](auto j) LEAN_INLINE {
    a[4 * j] = _mm512_unpacklo_epi64(b[4 * j], b[4 * j + 2]);
    a[4 * j + 1] = _mm512_unpackhi_epi64(b[4 * j], b[4 * j + 2]);
    a[4 * j + 2] = _mm512_unpacklo_epi64(b[4 * j + 1], b[4 * j + 3]);
    a[4 * j + 3] = _mm512_unpackhi_epi64(b[4 * j + 1], b[4 * j + 3]);
  });
  unrolled<4>([&](auto k) LEAN_INLINE {
    const __m512i even01 = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
    _mm512_storeu_si512(words + stride * k, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_storeu_si512(words + stride * (4 + k), _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_storeu_si512(words + stride * (8 + k), _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_storeu_si512(words + stride * (12 + k), _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  });
}
