// What happens to a score between the dot product and softmax, once for all backends, in this order: scale,
// row scale, softcap, ALiBi, mask. Included by each backend inside its namespace, on the CPU once per
// instruction set.
//
// `Math` has the arithmetic: a vector's on the CPU, a float's on a GPU. LEAN_BACKEND_INLINE is how a backend
// declares functions that it always inlines. ScoreOptions are in params.h.

// Brings a dot product to units of log2 or, with a softcap, to units of that. `scale` is the call's, times
// ScoreOptions::unit. Without more to do this is the score.
template <class Math>
LEAN_BACKEND_INLINE typename Math::F scaled_score(typename Math::F dot, typename Math::F scale) {
  return Math::mul(dot, scale);
}

// What the scores of some tokens and rows have in common.
template <class Math>
struct ScoreTerms {
  LEAN_BACKEND_INLINE explicit ScoreTerms(const ScoreOptions& options)
      : capped(options.softcap != 0.0f), softcap(Math::set1(options.softcap)) {}

  bool row_scaled = false;  // tokens have scales of their own
  bool capped;
  bool biased = false;  // by ALiBi
  typename Math::F softcap;
};

// Makes a score of a scaled one. row_scale() is the token's, minus_slope() ALiBi's slope in units of log2,
// negated, distance() that of token and query row: they are called where the terms need them, so that a GPU
// keeps none of them in registers. mask(score) is -inf where the row does not see the token.
template <class Math, class RowScale, class Slope, class Distance, class Mask>
LEAN_BACKEND_INLINE typename Math::F modified_score(typename Math::F score, const ScoreTerms<Math>& terms,
                                                    const RowScale& row_scale, const Slope& minus_slope,
                                                    const Distance& distance, const Mask& mask) {
  if (terms.row_scaled) score = Math::mul(score, row_scale());
  if (terms.capped) score = Math::mul(Math::tanh(score), terms.softcap);
  if (terms.biased) score = Math::fma(minus_slope(), distance(), score);
  return mask(score);
}
