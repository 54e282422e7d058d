// A tile kernel over int8 rows with products in fp32: the rows are dequantised in registers, which takes two
// instructions for a vector. Included by one source file per instruction set, after tile_kernel-inl.h.

struct Int8Rows : Fp32Rows<float> {
  using Fp32Rows::Fp32Rows;
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

// The kernel for q and out of T: their rows are converted where they are packed and written, so that all
// dtypes share the loops over K and V.
template <class T>
struct Int8TileKernel {
  using Rows = TileKernelFor<int8_t, Int8Rows>;
  using Converted = Fp32Rows<T>;
  static constexpr int kColumns = Converted::kColumns;
  // bf16 is loaded and stored as its even columns and its odd ones.
  static constexpr bool kInterleaves = Converted::kRowDtype == DType::bfloat16;

  static void pack_query(const TileState& t, int row, const void* q) {
    float floats[kMaxHeadDim + kColumns];
    for (int column = 0; column < t.head_dim; column += kColumns) {
      const int columns = t.head_dim - column;
      const T* const from = static_cast<const T*>(q) + column;
      Simd::Pair x = columns < kColumns ? Converted::load_tail(from, columns) : Converted::load(from);
      if constexpr (kInterleaves) x = Simd::interleave(x);
      Simd::store(floats + column, x.a);
      Simd::store(floats + column + Simd::kLanes, x.b);
    }
    Rows::pack_query(t, row, floats);
  }

  static void write_output(const TileState& t, int row, float factor, void* out) {
    float floats[kMaxHeadDim + kColumns];
    Rows::write_output(t, row, factor, floats);
    for (int column = 0; column < t.head_dim_v; column += kColumns) {
      Simd::Pair x = {Simd::load(floats + column), Simd::load(floats + column + Simd::kLanes)};
      if constexpr (kInterleaves) x = Simd::deinterleave(x);
      Converted::store_output(static_cast<T*>(out) + column, std::min(t.head_dim_v - column, kColumns), x.a,
                              x.b);
    }
  }

  static constexpr TileKernel kernel(const char* instruction_set) {
    TileKernel r = Rows::kernel_as_is(instruction_set);
    if (Converted::kRowDtype == DType::float32) return r;
    r.row_dtype = Converted::kRowDtype;
    r.pack_query = pack_query;
    r.write_output = write_output;
    return r;
  }
};
