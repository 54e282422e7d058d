// What benchmarks compare decode with, on a CPU: the schedules that stream-K replaces, and reading alone.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/backend.h"
#include "ops/decode_call.h"
#include "ops/dispatch.h"

namespace lean {
namespace {

template <class Run>
std::tuple<Tensor, Tensor> on_cpu(const DecodeArgs& args, const Run& run) {
  DecodeCall call(args);
  const DecodeParams& params = call.with_outputs();
  if (call.out->numel() > 0) run(params);
  return {*call.out, *call.lse};
}

std::tuple<Tensor, Tensor> decode_fixed_split(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const OptionalTensor& seq_lens, int64_t splits) {
  if (splits < 1) fail("decode_fixed_split: splits is ", splits, "; it must be at least 1");
  return on_cpu({.q = q, .k_cache = k_cache, .v_cache = v_cache, .seq_lens = seq_lens},
                [&](const DecodeParams& params) { cpu::decode_fixed_split(params, splits); });
}

std::tuple<Tensor, Tensor> read_only(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                     const OptionalTensor& seq_lens) {
  return on_cpu({.q = q, .k_cache = k_cache, .v_cache = v_cache, .seq_lens = seq_lens}, cpu::read_only);
}

}  // namespace
}  // namespace lean

STABLE_TORCH_LIBRARY_FRAGMENT(LEAN_OP_LIBRARY, m) {
  m.def(
      "decode_fixed_split(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? seq_lens=None, *, int splits=1) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "read_only(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? seq_lens=None) -> (Tensor out, Tensor "
      "lse)");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_OP_LIBRARY, CPU, m) {
  m.impl("decode_fixed_split", TORCH_BOX(&lean::decode_fixed_split));
  m.impl("read_only", TORCH_BOX(&lean::read_only));
}
