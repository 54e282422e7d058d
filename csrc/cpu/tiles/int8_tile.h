// A tile routine over int8 rows with products in fp32: they are converted in registers, which takes two
// instructions for a vector. Included by one source file per instruction set, after tile_impl.h.

struct Int8Format : Fp32Format<float> {
  using Fp32Format::Fp32Format;
  static constexpr bool kConverts = true;
  static constexpr bool kBroadcastsAgain = Simd::kMultiplyBroadcasts;

  static Chunk load_two(const int8_t* lower, const int8_t* upper) { return Simd::load_halves(lower, upper); }
  static Chunk load_two_tail(const int8_t* lower, const int8_t* upper, int columns) {
    return Simd::load_halves_tail(lower, upper, columns);
  }
  static Chunk load(const int8_t* row) { return Simd::load_pair(row); }
  static Chunk load_tail(const int8_t* row, int columns) { return Simd::load_pair_tail(row, columns); }
  template <class Load>
  static Chunk load_step(const void* const* rows, const Load& load) {
    return load(static_cast<const int8_t*>(rows[0]));
  }
};

// For q and out of T: their rows are converted where they are packed and written, so that all dtypes share
// the loops over K and V.
template <class T>
struct Int8Tile {
  using Rows = Tile<int8_t, Int8Format>;
  using Format = Fp32Format<T>;
  static constexpr int kColumns = Format::kColumns;
  // bf16 is loaded and stored as its even columns and its odd ones.
  static constexpr bool kInterleaves = Format::kRowDtype == DType::bfloat16;

  static void pack_query(const TileState& t, int row, const void* q) {
    float wide[kMaxHeadDim + kColumns];
    for (int column = 0; column < t.head_dim; column += kColumns) {
      const int columns = t.head_dim - column;
      const T* const from = static_cast<const T*>(q) + column;
      Simd::Pair x = columns < kColumns ? Format::load_tail(from, columns) : Format::load(from);
      if constexpr (kInterleaves) x = Simd::interleave(x);
      Simd::store(wide + column, x.a);
      Simd::store(wide + column + Simd::kLanes, x.b);
    }
    Rows::pack_query(t, row, wide);
  }

  static void write_output(const TileState& t, int row, float factor, void* out) {
    float wide[kMaxHeadDim + kColumns];
    Rows::write_output(t, row, factor, wide);
    for (int column = 0; column < t.head_dim_v; column += kColumns) {
      Simd::Pair x = {Simd::load(wide + column), Simd::load(wide + column + Simd::kLanes)};
      if constexpr (kInterleaves) x = Simd::deinterleave(x);
      Format::store_output(static_cast<T*>(out) + column, std::min(t.head_dim_v - column, kColumns), x.a,
                           x.b);
    }
  }

  static constexpr TileRoutine routine(const char* instruction_set) {
    TileRoutine r = Rows::routine_as_is(instruction_set);
    if (Format::kRowDtype == DType::float32) return r;
    r.row_dtype = Format::kRowDtype;
    r.pack_query = pack_query;
    r.write_output = write_output;
    return r;
  }
};
