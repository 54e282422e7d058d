// Control of the emulated device from the tests; loading this also registers torch.ops.lean_attn_emulated.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cuda/backend.h"
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
  m.def("take_error", [] { return lean::cuda::take_error(0); });
  m.def("run", [] { Device::get().run(); });
  m.def("replay", [] { Device::get().replay(); });
  m.def("launches", [] { return Device::get().launches(); });
  m.def("last_grid", [] { return Device::get().last_grid(); });
}
