// The attention of a warp to its tokens: Q K^T, online softmax and P V, 16 tokens at a time.
#pragma once

#include "cuda/decode/kv_format.h"
#include "cuda/decode/kv_ring.h"
#include "cuda/decode/rows.h"
#include "softmax_state.h"

namespace lean::cuda {

// Scores, in units of log2, may exceed what they are taken relative to by this much: fp16 holds their
// weights, and the outputs need not be rescaled whenever there is a new maximum.
constexpr float kSlack = 8.0f;

template <class Config>
class Attention {
  using T = typename Config::T;
  using KPanels = typename Config::KPanels;
  using VPanels = typename Config::VPanels;
  static constexpr int kRowTiles = Config::row_tiles;
  static constexpr int kColumns = Config::warp_dim_v / 8;

 public:
  // Lane 4 g + t has rows g and g + 8 (half 0 and 1) of each row tile. A score of theirs is relative to
  // `reference`, which it may exceed by `slack`; before anything is seen that is -inf.
  struct Row {
    float reference = 0.0f;
    float slack = kMinusInfinity;
    float l = 0.0f;  // of this lane's tokens

    LEAN_DEVICE float m() const { return slack == kMinusInfinity ? kMinusInfinity : reference; }
  };
  Row rows[kRowTiles][2];
  float output[kRowTiles][kColumns][4] =
      {};  // of rows g, g, g + 8, g + 8; columns 2 t, 2 t + 1, 2 t, 2 t + 1

  LEAN_DEVICE Attention(const DecodeArguments& arguments, const Thread& thread, TokenSpanOf<int32_t> all_see)
      : a_(arguments), lane_(thread.lane), all_see_(all_see) {
    if constexpr (Config::query_in_registers) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
        for (int kk = 0; kk < Config::head_dim / 16; ++kk) load_query(q_[rt][kk], rt, kk);
      }
    }
  }

  // Attends to the step whose items come next, which begins at `first_token` of the segment.
  LEAN_DEVICE void step(KvRing<Config>& ring, int32_t first_token) {
    float scores[kRowTiles][2][4] = {};
    float scales[2][4];  // of K's and of V's tokens of this lane's columns
    for_each_panel<KPanels::count>(
        [&](auto panel) { multiply_panel<panel>(ring.template next<panel>(), scores, scales); });
    uint32_t weights[kRowTiles][4];
    soften(scores, scales, weights, first_token);
    for_each_panel<VPanels::count>(
        [&](auto panel) { add_panel<panel>(ring.template next<KPanels::count + panel>(), weights); });
  }

 private:
  LEAN_DEVICE void load_query(uint32_t (&a)[4], int rt, int kk) const {
    hw::load_matrices(
        a, query_rows<Config>() + Config::QRows::offset(rt * kTileRows + lane_ % 16, lane_ / 16) + 32 * kk);
  }

  // Calls `take` with the number of each panel, as a constant.
  template <int count, int panel = 0, class Take>
  static LEAN_DEVICE void for_each_panel(const Take& take) {
    take(std::integral_constant<int, panel>{});
    if constexpr (panel + 1 < count) for_each_panel<count, panel + 1>(take);
  }

  // scores += Q K^T over the dims of one panel.
  template <int kPanel>
  LEAN_DEVICE void multiply_panel(const char* panel, float (&scores)[kRowTiles][2][4],
                                  float (&scales)[2][4]) {
    with_format<Config>(a_.p.k.dtype, [&](auto format) {
      using Fragments = KeyFragments<Config, format()>;
      const char* const at = panel + Fragments::lane_offset(lane_);
#pragma unroll
      for (int dim = 0; dim < KPanels::dims; dim += Fragments::kDims) {
        const Fragments k(at + dim * static_cast<int>(sizeof(typename Config::Element)));
#pragma unroll
        for (int i = 0; i < Fragments::kDims / 16; ++i) {
          const int kk = (kPanel * KPanels::dims + dim) / 16 + i;
#pragma unroll
          for (int rt = 0; rt < kRowTiles; ++rt) {
            if constexpr (Config::query_in_registers) {
              multiply(scores[rt], q_[rt][kk], k.b[i]);
            } else {
              uint32_t a[4];
              load_query(a, rt, kk);
              multiply(scores[rt], a, k.b[i]);
            }
          }
        }
      }
    });
    if constexpr (Config::quantised && kPanel == 0) {
      const char* const at = panel + Config::scales_at + lane_ % 4 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          const auto pair = hw::load_vector(reinterpret_cast<const hw::Float2*>(at + i * 64 + eight * 32));
          scales[i][eight * 2] = pair.x;
          scales[i][eight * 2 + 1] = pair.y;
        }
      }
    }
  }
  static LEAN_DEVICE void multiply(float (&scores)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[2][2]) {
    hw::multiply_add<T>(scores[0], a, b[0][0], b[0][1]);
    hw::multiply_add<T>(scores[1], a, b[1][0], b[1][1]);
  }

  // One step of online softmax in base 2: scores become weights, rounded to T as the A operand of P V. (The
  // weights and their sum are relative to what need not be their maximum, only near enough for them to stay
  // in range: no lane has to know the others' scores, and nothing is rescaled, until one exceeds it.)
  LEAN_DEVICE void soften(float (&scores)[kRowTiles][2][4], const float (&scales)[2][4],
                          uint32_t (&weights)[kRowTiles][4], int32_t first_token) {
    const bool all_seen = first_token >= all_see_.begin && first_token + kStepTokens <= all_see_.end;
    if (a_.only_scale && all_seen) {
      for_each_score(scores, [&](float& score, Row& row, int i) {
        if constexpr (Config::quantised) score *= scales[0][i];
        score = fmaf(score, a_.scale, -row.reference);
      });
    } else {
      modify(scores, scales, first_token, all_seen);
    }
    bool above = false;
    for_each_row([&](int rt, int half, int) { above |= largest(scores[rt], half) > rows[rt][half].slack; });
    if (hw::any(above)) raise_references(scores);
    for_each_score(scores, [&](float& score, Row& row, int i) {
      score = hw::exp2_fast(score);
      row.l += score;
      if constexpr (Config::quantised) score *= scales[1][i];
    });
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[rt][i] = hw::pack<T>(scores[rt][i / 2][i % 2 * 2], scores[rt][i / 2][i % 2 * 2 + 1]);
      }
    }
  }

  // Calls take(row tile, half, the row's index) for each row of this lane.
  template <class Take>
  LEAN_DEVICE void for_each_row(const Take& take) const {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) take(i / 2, i % 2, i * 8 + lane_ / 4);
  }
  // Calls take(score, its Row, i) for each score: column i of its row's, of token token_of(i).
  template <class Take>
  LEAN_DEVICE void for_each_score(float (&scores)[kRowTiles][2][4], const Take& take) {
    for_each_row([&](int rt, int half, int) {
#pragma unroll
      for (int i = 0; i < 4; ++i) take(scores[rt][i / 2][half * 2 + i % 2], rows[rt][half], i);
    });
  }
  LEAN_DEVICE int token_of(int i) const { return i / 2 * 8 + lane_ % 4 * 2 + i % 2; }

  static LEAN_DEVICE float largest(const float (&scores)[2][4], int half) {
    return fmaxf(fmaxf(scores[0][half * 2], scores[0][half * 2 + 1]),
                 fmaxf(scores[1][half * 2], scores[1][half * 2 + 1]));
  }

  // Makes scores of the dot products, relative to their rows' references, where that takes more than a scale.
  LEAN_DEVICE void modify(float (&scores)[kRowTiles][2][4], const float (&scales)[2][4], int32_t first_token,
                          bool all_seen) {
    const SharedState<Config>& s = shared_state<Config>();
    ScoreTerms<ScoreMath> terms(a_.score);
    terms.row_scaled = Config::quantised;
    terms.biased = a_.p.alibi_slopes != nullptr;
    for_each_row([&](int rt, int half, int row) {
      const RowView<Config> view(a_, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t token = first_token + token_of(i);
        float& score = scores[rt][i / 2][half * 2 + i % 2];
        const float modified = modified_score<ScoreMath>(
            scaled_score<ScoreMath>(score, a_.scale), terms, [&] { return scales[0][i]; },
            [&] { return -s.slopes[row]; }, [&] { return static_cast<float>(abs(s.positions[row] - token)); },
            [&](float x) { return all_seen || view.sees(token) ? x : kMinusInfinity; });
        score = modified - rows[rt][half].reference;
      }
    });
  }

  // Makes the maximum of a row's scores its reference where that is more. Sums and outputs so far, and the
  // scores, are brought to it.
  LEAN_DEVICE void raise_references(float (&scores)[kRowTiles][2][4]) {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Row& row = rows[rt][half];
        float most = largest(scores[rt], half);
        most = fmaxf(most, hw::shuffle_xor(most, 1));
        most = fmaxf(most, hw::shuffle_xor(most, 2));
        // A row that has seen nothing takes any finite score, and has nothing to bring to it.
        const bool first = row.slack == kMinusInfinity, raised = first ? most > kMinusInfinity : most > 0.0f;
        const float reference = raised ? row.reference + most : row.reference;
        const float by = reference - row.reference;
        factor[half] = first || !raised ? 1.0f : hw::exp2_fast(-by);
        row.l *= factor[half];
        row.reference = reference;
        if (raised) row.slack = kSlack;
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[rt][i / 2][half * 2 + i % 2] -= raised ? by : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) output[rt][j][e] *= factor[e / 2];
      }
    }
  }

  // output += P V for the dims of one panel.
  template <int kPanel>
  LEAN_DEVICE void add_panel(const char* panel, const uint32_t (&weights)[kRowTiles][4]) {
    with_format<Config>(a_.p.k.dtype, [&](auto format) {
      using Fragments = ValueFragments<Config, format()>;
      const char* const at = panel + Fragments::lane_offset(lane_);
#pragma unroll
      for (int dim = 0; dim < VPanels::dims; dim += Fragments::kDims) {
        const Fragments v(at + dim * static_cast<int>(sizeof(typename Config::Element)));
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
          for (int i = 0; i < Fragments::kDims / 8; ++i) {
            hw::multiply_add<T>(output[rt][(kPanel * VPanels::dims + dim) / 8 + i], weights[rt], v.b[i][0],
                                v.b[i][1]);
          }
        }
      }
    });
  }

  const DecodeArguments& a_;
  const int lane_;
  const TokenSpanOf<int32_t> all_see_;  // relative to the segment's first step
  uint32_t q_[kRowTiles][Config::query_in_registers ? Config::head_dim / 16 : 1][4];
};

}  // namespace lean::cuda
