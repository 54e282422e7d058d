// Control of the emulated device from the tests; loading this also registers torch.ops.lean_attn_emulated.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "emulated_hardware.h"

namespace py = pybind11;
using lean::emulation::Device;
using lean::emulation::Fault;
using lean::emulation::Options;

PYBIND11_MODULE(lean_attention_emulated, m) {
  py::native_enum<Fault>(m, "Fault", "enum.Enum")
      .value("none", Fault::none)
      .value("unordered_release", Fault::unordered_release)
      .value("unordered_acquire", Fault::unordered_acquire)
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
  // A warp's matrix collectives by themselves: fragments in, fragments out, a row per lane.
  m.def("multiply_add", [](const std::vector<std::array<uint32_t, 4>>& a,
                           const std::vector<std::array<uint32_t, 2>>& b) {
    std::vector<std::array<float, 4>> c(lean::emulation::kWarpLanes);
    std::vector<lean::emulation::MatrixProduct> products(c.size());
    void* arguments[lean::emulation::kWarpLanes];
    for (size_t lane = 0; lane < c.size(); ++lane) {
      products[lane] = {
          c[lane].data(), a[lane].data(), {b[lane][0], b[lane][1]}, &lean::hw::bits_to_float<lean::hw::Half>};
      arguments[lane] = &products[lane];
    }
    lean::emulation::complete(lean::emulation::Collective::multiply_add, arguments);
    return c;
  });
  m.def("load_matrices", [](const std::vector<std::array<uint16_t, 8>>& rows, bool transposed) {
    std::vector<std::array<uint32_t, 4>> r(lean::emulation::kWarpLanes);
    std::vector<lean::emulation::MatrixLoad> loads(r.size());
    void* arguments[lean::emulation::kWarpLanes];
    for (size_t lane = 0; lane < r.size(); ++lane) {
      loads[lane].r = r[lane].data();
      std::copy(rows[lane].begin(), rows[lane].end(), loads[lane].row);
      arguments[lane] = &loads[lane];
    }
    lean::emulation::complete(transposed ? lean::emulation::Collective::load_transposed
                                         : lean::emulation::Collective::load_matrices,
                              arguments);
    return r;
  });
  m.def("shuffle_xor", [](std::array<float, lean::emulation::kWarpLanes> values, int mask) {
    lean::emulation::FloatExchange exchanges[lean::emulation::kWarpLanes];
    void* arguments[lean::emulation::kWarpLanes];
    for (int lane = 0; lane < lean::emulation::kWarpLanes; ++lane) {
      exchanges[lane] = {values[lane], mask};
      arguments[lane] = &exchanges[lane];
    }
    lean::emulation::complete(lean::emulation::Collective::shuffle_xor, arguments);
    for (int lane = 0; lane < lean::emulation::kWarpLanes; ++lane) values[lane] = exchanges[lane].value;
    return values;
  });
  m.def("shuffle_up", [](std::array<int64_t, lean::emulation::kWarpLanes> values, int lanes) {
    lean::emulation::IntExchange exchanges[lean::emulation::kWarpLanes];
    void* arguments[lean::emulation::kWarpLanes];
    for (int lane = 0; lane < lean::emulation::kWarpLanes; ++lane) {
      exchanges[lane] = {values[lane], lanes};
      arguments[lane] = &exchanges[lane];
    }
    lean::emulation::complete(lean::emulation::Collective::shuffle_up, arguments);
    for (int lane = 0; lane < lean::emulation::kWarpLanes; ++lane) values[lane] = exchanges[lane].value;
    return values;
  });
  m.def("run", [] { Device::get().run(); });
  m.def("replay", [] { Device::get().replay(); });
  m.def("launches", [] { return Device::get().launches(); });
  m.def("last_grid", [] { return Device::get().last_grid(); });
}
