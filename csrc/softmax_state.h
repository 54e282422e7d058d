// The algebra of online softmax: the partial state (m, l, O) of one query row and how two of them
// merge.
//
// For scores s_j in units of log2 (that is, already multiplied by scale * log2(e)):
//   m ~ max_j s_j    l = sum_j 2^(s_j - m)    O = sum_j 2^(s_j - m) v_j
// where any m serves that keeps the powers in range: here the maximum, or that of the first scores while
// later ones are not much above it. So out = O / l and the log-sum-exp is (m + log2 l) * ln 2. Merging is
// associative (LeanAttention, arXiv 2405.10480, section 4.1) and the empty state (-inf, 0, 0) is its
// identity, which is what lets a row be cut anywhere.
//
// m is one of the scores that are not NaN, and -inf only if they all are; a NaN score makes l and O NaN
// instead, so that it reaches the result from whichever piece it was in.
#pragma once

#include <cmath>

#include "schedule.h"

namespace lean {

// Constants rather than numeric_limits members, which device code may not call without a flag.
inline constexpr float kMinusInfinity = -__builtin_inff();
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

struct SoftmaxState {
  float m = kMinusInfinity;
  float l = 0.0f;
};

// Factor that brings sums relative to `from` to the m `to` >= `from`. An empty state weighs
// nothing, also where both are empty: -inf - -inf would be NaN. An m of another base than 2 comes with the
// log2 of its base: brought to units of log2 before the difference is taken, a large one would overflow.
LEAN_HOST_DEVICE inline float rescale(float from, float to, float log2_base = 1.0f) {
  return from == kMinusInfinity ? 0.0f : exp2f((from - to) * log2_base);
}

// The weights with which two states' outputs add up in the merged one: O = a.O * wa + b.O * wb.
struct Merged {
  SoftmaxState state;
  float weight_a;
  float weight_b;
};

LEAN_HOST_DEVICE inline Merged merge(SoftmaxState a, SoftmaxState b, float log2_base = 1.0f) {
  const float m = fmaxf(a.m, b.m);
  const float wa = rescale(a.m, m, log2_base), wb = rescale(b.m, m, log2_base);
  // A state with m = -inf adds its l unweighted: it is 0, or NaN where every score so far was NaN.
  const float la = a.m == kMinusInfinity ? a.l : a.l * wa;
  const float lb = b.m == kMinusInfinity ? b.l : b.l * wb;
  return {{m, la + lb}, wa, wb};
}

// out = O * normaliser(l); a row that saw nothing is zero.
LEAN_HOST_DEVICE inline float normaliser(float l) {
  return l == 0.0f ? 0.0f : 1.0f / l;
}

// Natural log-sum-exp of the row; -inf for a row that saw nothing.
LEAN_HOST_DEVICE inline float log_sum_exp(SoftmaxState s) {
  return s.l == 0.0f ? kMinusInfinity : (s.m + log2f(s.l)) * kLn2;
}

// The log-sum-exp of a state whose m is of the base whose log2 is given, to that base.
LEAN_HOST_DEVICE inline float log_sum_exp_to(SoftmaxState s, float log2_base) {
  return s.l == 0.0f ? kMinusInfinity : s.m + log2f(s.l) * (1.0f / log2_base);
}

// The state whose normalised output has this log-sum-exp; its m is of the same base.
LEAN_HOST_DEVICE inline SoftmaxState from_log_sum_exp(float lse) {
  return {lse, lse == kMinusInfinity ? 0.0f : 1.0f};
}

// A row's sums together with its sink, a natural logarithm; `state` is in units of log2, the merged one is
// not.
LEAN_HOST_DEVICE inline Merged merge_sink(SoftmaxState state, float sink) {
  return merge({state.m * kLn2, state.l}, from_log_sum_exp(sink), kLog2e);
}

}  // namespace lean
