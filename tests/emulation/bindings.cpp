// Control of the emulated device from the tests; loading this also registers torch.ops.lean_attn_emulated.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/backend.h"
#include "cuda/decode/arguments.h"
#include "cuda/decode/kv_format.h"
#include "emulated_hardware.h"

namespace py = pybind11;
using namespace lean::emulation;

namespace {

template <class T>
using PerLane = std::array<T, kWarpLanes>;

// Completes a collective whose lane i comes with argument_of(i); returns the arguments as it leaves them.
template <class Argument, class ArgumentOf>
PerLane<Argument> complete(Collective which, const ArgumentOf& argument_of) {
  PerLane<Argument> arguments;
  void* pointers[kWarpLanes];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    arguments[lane] = argument_of(lane);
    pointers[lane] = &arguments[lane];
  }
  lean::emulation::complete(which, pointers);
  return arguments;
}

template <class Exchange>
auto values_of(const PerLane<Exchange>& exchanges) {
  PerLane<decltype(Exchange::value)> values;
  for (int lane = 0; lane < kWarpLanes; ++lane) values[lane] = exchanges[lane].value;
  return values;
}

using Words = std::vector<uint32_t>;

// Each word's four elements, as two words of T.
template <class Convert>
Words converted(const Words& words, const Convert& convert) {
  Words result(2 * words.size());
  for (size_t i = 0; i < words.size(); ++i) convert(words[i], result[2 * i], result[2 * i + 1]);
  return result;
}
template <class T>
Words dequantise(const Words& words, const std::string& format) {
  using lean::DType;
  if (format == "int8") return converted(words, lean::cuda::dequantise<T, DType::int8>);
  if (format == "float8_e5m2") return converted(words, lean::cuda::dequantise<T, DType::float8_e5m2>);
  return converted(words, lean::cuda::dequantise<T, DType::float8_e4m3>);
}

// A cache of one slot, of which only sizes matter.
lean::DecodeParams params(int64_t capacity, int64_t query_tokens, int64_t num_kv_heads, int64_t group,
                          lean::Visibility visibility) {
  lean::DecodeParams p{};
  p.batch = 1;
  p.pages.num_blocks = p.pages.max_blocks = 1;
  p.pages.block_size = capacity;
  p.query_tokens = query_tokens;
  p.num_heads = num_kv_heads * group;
  p.num_kv_heads = num_kv_heads;
  p.visibility = visibility;
  return p;
}

// (batch, kv_head, row_block, tokens, q_len, span, output tile, tiles) of all segments, CTA by CTA. Begins
// and ends lie side by side.
using SegmentRow = std::array<int64_t, 11>;
template <class Int, class Divisor>
std::vector<SegmentRow> segments_of(const lean::GeometryOf<Int, Divisor>& geometry,
                                    const std::vector<std::array<int64_t, 3>>& lengths, int64_t num_ctas) {
  const auto length_of = [&](Int i) {
    const auto& [tokens, leftpad, q_len] = lengths[i];
    return lean::SequenceLengthOf<Int>{static_cast<Int>(tokens), static_cast<Int>(leftpad),
                                       static_cast<Int>(q_len)};
  };
  std::vector<Int> begin{0};
  for (size_t i = 0; i < lengths.size(); ++i) {
    begin.push_back(begin.back() + geometry.sequence_tiles(length_of(static_cast<Int>(i))));
  }
  const lean::GridOf<Int> grid{static_cast<Int>(num_ctas), begin.back()};
  std::vector<SegmentRow> rows;
  for (Int cta = 0, sequence = 0; cta < grid.num_ctas; ++cta) {
    const lean::LeanRangeOf<Int> range = grid.range(cta);
    if (range.begin == range.end) continue;
    while (begin[sequence + 1] <= range.begin) ++sequence;
    lean::SegmentWalkOf<Int, Divisor> walk(geometry, range, sequence, begin[sequence], length_of);
    for (lean::SegmentOf<Int> s; walk.next(s, length_of);) {
      rows.push_back({s.batch, s.kv_head, s.row_block, s.length.tokens, s.length.q_len, s.span.begin,
                      s.span.end, s.output_begin, s.output_end, s.tiles.begin, s.tiles.end});
    }
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(lean_attention_emulated, m) {
  py::native_enum<Fault>(m, "Fault", "enum.Enum")
      .value("none", Fault::none)
      .value("unordered_release", Fault::unordered_release)
      .value("unordered_acquire", Fault::unordered_acquire)
      .value("no_barrier_before_release", Fault::no_barrier_before_release)
      .value("no_barrier_after_acquire", Fault::no_barrier_after_acquire)
      .value("reversed_tickets", Fault::reversed_tickets)
      .value("flags_stay_up", Fault::flags_stay_up)
      .value("short_copy_wait", Fault::short_copy_wait)
      .value("no_warp_barrier", Fault::no_warp_barrier)
      .finalize();
  m.def(
      "configure",
      [](uint64_t seed, int resident_ctas, int sms, int ctas_per_sm, int capability, bool deferred,
         Fault fault) {
        Device::get().configure(Options{seed, resident_ctas, sms, ctas_per_sm, capability, deferred, fault});
      },
      py::kw_only(), py::arg("seed"), py::arg("resident_ctas") = 4, py::arg("sms") = 3,
      py::arg("ctas_per_sm") = 2, py::arg("capability") = 80, py::arg("deferred") = false,
      py::arg("fault") = Fault::none);
  // A warp's collectives by themselves, a row per lane.
  m.def("multiply_add", [](const PerLane<std::array<uint32_t, 4>>& a,
                           const PerLane<std::array<uint32_t, 2>>& b) {
    PerLane<std::array<float, 4>> c{};
    complete<MatrixProduct>(Collective::multiply_add, [&](int lane) {
      return MatrixProduct{
          c[lane].data(), a[lane].data(), {b[lane][0], b[lane][1]}, &lean::hw::bits_to_float<lean::hw::Half>};
    });
    return c;
  });
  m.def("load_matrices", [](const PerLane<std::array<uint16_t, 8>>& rows, bool transposed) {
    PerLane<std::array<uint32_t, 4>> r{};
    complete<MatrixLoad>(transposed ? Collective::load_transposed : Collective::load_matrices, [&](int lane) {
      MatrixLoad load{r[lane].data(), {}};
      std::copy(rows[lane].begin(), rows[lane].end(), load.row);
      return load;
    });
    return r;
  });
  m.def("shuffle_xor", [](const PerLane<float>& values, int mask) {
    const auto after = complete<FloatExchange>(Collective::shuffle_xor,
                                               [&](int lane) { return FloatExchange{values[lane], mask}; });
    return values_of(after);
  });
  m.def("shuffle_up", [](const PerLane<int64_t>& values, int lanes) {
    const auto after = complete<IntExchange>(Collective::shuffle_up,
                                             [&](int lane) { return IntExchange{values[lane], lanes}; });
    return values_of(after);
  });
  // Of words that hold four elements each.
  m.def("dequantise", [](const Words& words, const std::string& format, bool bfloat16) {
    return bfloat16 ? dequantise<lean::hw::BFloat16>(words, format)
                    : dequantise<lean::hw::Half>(words, format);
  });
  m.def("e4m3_to_fp16_by_integers",
        [](const Words& words) { return converted(words, lean::cuda::e4m3_to_fp16); });
  m.def("divide", [](int32_t n, int32_t divisor) { return n / lean::FastDivisor(divisor); });
  // The windows that kernels see of a call's; raises where the call is too large for 32 bits.
  m.def(
      "windows",
      [](int64_t capacity, int64_t query_tokens, int64_t group, int64_t most_tiles, int64_t window_left,
         int64_t window_right) {
        const lean::cuda::Geometry32 geometry = lean::cuda::geometry32(
            params(capacity, query_tokens, 1, group, {window_left, window_right}), 16, 128, most_tiles);
        return std::pair{geometry.visibility.window_left, geometry.visibility.window_right};
      },
      py::kw_only(), py::arg("capacity") = 1, py::arg("query_tokens") = 1, py::arg("group") = 1,
      py::arg("most_tiles") = 1, py::arg("window_left") = -1, py::arg("window_right") = -1);
  // The schedule as kernels compute it, and in 64 bits; raises where that needs them. `lengths` has (tokens,
  // leftpad, q_len).
  m.def(
      "segments",
      [](const std::vector<std::array<int64_t, 3>>& lengths, int64_t num_ctas, int64_t num_kv_heads,
         int64_t group, int64_t rows_per_block, int64_t tile_tokens, int64_t window_left,
         int64_t window_right) {
        const lean::DecodeParams p = params(1, 1, num_kv_heads, group, {window_left, window_right});
        const lean::Geometry wide = p.geometry(rows_per_block, tile_tokens);
        int64_t tiles = 0;
        for (const auto& [tokens, leftpad, q_len] : lengths) {
          tiles += wide.sequence_tiles({tokens, leftpad, q_len});
        }
        const lean::cuda::Geometry32 narrow = lean::cuda::geometry32(p, rows_per_block, tile_tokens, tiles);
        return std::pair{segments_of(narrow, lengths, num_ctas), segments_of(wide, lengths, num_ctas)};
      },
      py::kw_only(), py::arg("lengths"), py::arg("num_ctas"), py::arg("num_kv_heads"), py::arg("group"),
      py::arg("rows_per_block"), py::arg("tile_tokens"), py::arg("window_left"), py::arg("window_right"));
  m.def("take_error", [] { return lean::cuda::take_error(0); });
  m.def("run", [] { Device::get().run(); });
  m.def("replay", [] { Device::get().replay(); });
  m.def("launches", [] { return Device::get().launches(); });
  m.def("last_grid", [] { return Device::get().last_grid(); });
}
