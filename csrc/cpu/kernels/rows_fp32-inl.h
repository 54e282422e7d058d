// K and V rows whose products are in fp32. Included by microkernel-inl.h, once per instruction set.
//
// A KvRows type says how rows of K, V and q are loaded, in steps of how many columns and tokens, and what
// multiplies them.

// Rows of dtype T, which are converted to fp32 as they are loaded.
template <class T>
struct Fp32Rows {
  explicit Fp32Rows(const TileState&) {}

  using F = Simd::F;
  using Tensor = T;  // q and out
  static constexpr DType kRowDtype = dtype_of_element(T{});
  using Query = float;
  using Weight = float;
  // A step of the dot products has kDotColumns columns (half a vector for each of two tokens, twice), one of
  // the weighted sum kColumns (two vectors).
  static constexpr int kDotColumns = Simd::kLanes;
  static constexpr int kColumns = 2 * Simd::kLanes;
  static constexpr int kTokensPerStep = 1;
  // One round of the weighted sum's loop has so many steps.
  static constexpr int kStepsAtOnce = 2;
  static constexpr int kPairsAtOnce = 4;
  static constexpr bool kConverts = kRowDtype != DType::float32;
  static constexpr bool kReadsWholeRows = true;
  // That of Simd::load_pair.
  static constexpr ColumnOrder kColumnOrder = kRowDtype == DType::bfloat16  ? ColumnOrder::even_odd
                                              : kRowDtype == DType::float16 ? Simd::kHalfOrder
                                                                            : ColumnOrder::natural;
  // Weights are broadcast twice; see add_values.
  static constexpr bool kBroadcastsAgain = Simd::kMultiplyBroadcasts && kConverts;

  using Chunk = Simd::Pair;

  // Loads some columns of two rows: the first row's are in the lower halves, the second's in the upper ones.
  static Chunk load_two(const T* lower, const T* upper) { return Simd::load_halves(lower, upper); }
  static Chunk load_two_tail(const T* lower, const T* upper, int columns) {
    return Simd::load_halves_tail(lower, upper, columns);
  }
  // Loads the same columns of a query row, in both halves.
  static Chunk load_query(const Query* q) {
    return {Simd::load_twice(q), Simd::load_twice(q + Simd::kQueryCopies * Simd::kLanes / 2)};
  }
  static void pack_query(Query* to, const T* q, int columns) {
    const Chunk x = columns < kDotColumns ? load_two_tail(q, q, columns) : load_two(q, q);
    Simd::store_query(to, x.a);
    Simd::store_query(to + Simd::kQueryCopies * Simd::kLanes / 2, x.b);
  }
  static F dot(F sum, Chunk k, Chunk q) { return Simd::fma(k.b, q.b, Simd::fma(k.a, q.a, sum)); }

  static Chunk load(const T* row) { return Simd::load_pair(row); }
  static Chunk load_tail(const T* row, int columns) { return Simd::load_pair_tail(row, columns); }
  static Chunk load_whole_query(const Query* q) { return {Simd::load(q), Simd::load(q + Simd::kLanes)}; }
  // Loads what several products share.
  static Chunk load_shared_query(const Query* q) {
    return {Simd::load_shared(q), Simd::load_shared(q + Simd::kLanes)};
  }
  static void pack_whole_query(Query* to, const T* q, int columns) {
    const Chunk x = columns < kColumns ? load_tail(q, columns) : load(q);
    Simd::store(to, x.a);
    Simd::store(to + Simd::kLanes, x.b);
  }
  // Loads the chunk of V that one step of the weighted sum takes.
  template <class Load>
  static Chunk load_step(const void* const* rows, const Load& load) {
    return load(static_cast<const T*>(rows[0]));
  }
  // `again` is the same address as `weight`, in a way that the compiler may not see; see add_values.
  static void accumulate(F& a, F& b, const Weight* weight, const Weight* again, Chunk v) {
    a = Simd::fma(Simd::set1(*weight), v.a, a);
    b = Simd::fma(Simd::set1(*again), v.b, b);
  }
  // Does the same for one token, whatever kTokensPerStep is, with its weight in each lane.
  static void accumulate_token(F& a, F& b, F weight, Chunk v) {
    a = Simd::fma(weight, v.a, a);
    b = Simd::fma(weight, v.b, b);
  }
  // Stores two vectors of token-major weights, from place i on, as accumulate takes them: over their scores.
  template <int period>
  static void store_weights(float* scores, int i, F a, F b) {
    Simd::store(scores + i, a);
    Simd::store(scores + i + Simd::kLanes, b);
  }
  static void store_output(T* out, int columns, F a, F b) { Simd::store_pair_tail(out, columns, a, b); }
};
