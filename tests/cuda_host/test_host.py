"""What the host side of csrc/cuda asks of the CUDA runtime, in which order, and what it says on failures."""

from __future__ import annotations

import pytest

from tests.cuda_host import load

SHARED_BYTES, PARTIAL_FLOATS, KERNEL_THREADS = 70_000, 16 * (128 + 2) + 5, 128
MAX_SHARED, CARVEOUT = 0, 1  # of cudaFuncAttribute
ALL_AS_SHARED = 100  # cudaSharedmemCarveoutMaxShared
# An SM of 132 holds two CTAs; a CTA has at least two LeanTiles.
CTAS = 264


@pytest.fixture
def host():
    host = load()
    host.reset()
    return host


def call(host, **fields):
    made = host.Call()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def names(host) -> list[str]:
    return [name for name, _ in host.calls()]


def of(host, wanted: str) -> list[list[int]]:
    return [numbers for name, numbers in host.calls() if name == wanted]


LARGE = {"batch": 64, "tokens": 128 * 1024}


def test_a_kernel_is_prepared_once_for_each_device(host) -> None:
    host.decode(call(host, device=3))
    kernel, *_ = of(host, "cudaLaunchKernel")[0]
    assert of(host, "cudaFuncSetAttribute") == [
        [kernel, MAX_SHARED, SHARED_BYTES],
        [kernel, CARVEOUT, ALL_AS_SHARED],
    ]
    assert of(host, "cudaOccupancyMaxActiveBlocksPerMultiprocessor") == [
        [kernel, KERNEL_THREADS, SHARED_BYTES]
    ]
    assert {device for _, device in of(host, "cudaDeviceGetAttribute")} == {3}
    host.decode(call(host, device=3))
    assert len(of(host, "cudaFuncSetAttribute")) == 2
    host.decode(call(host, device=4))
    assert len(of(host, "cudaFuncSetAttribute")) == 4
    host.decode(call(host, device=4, heads=64))
    assert len({kernel for kernel, *_ in of(host, "cudaFuncSetAttribute")}) == 2
    assert len(of(host, "cudaFuncSetAttribute")) == 6


def test_attributes_are_set_before_the_occupancy_is_read_and_the_kernel_launched(host) -> None:
    host.decode(call(host))
    order = [name for name in names(host) if name not in ("cudaDeviceGetAttribute", "cudaGetSymbolAddress")]
    assert order == [
        "cudaFuncSetAttribute",
        "cudaFuncSetAttribute",
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
        "cudaLaunchKernel",
    ]


@pytest.mark.parametrize(
    ("fields", "ctas"),
    [
        (LARGE, CTAS),
        ({"batch": 2, "tokens": 1024}, 2 * 2 * 8 // 2),
        ({"batch": 1, "tokens": 1}, 1),
        ({**LARGE, "num_ctas": 1000}, 1000),
        ({"batch": 1, "tokens": 1024, "num_ctas": 1000}, 2 * 8),
    ],
    ids=["resident", "two tiles each", "one", "asked for", "no more than tiles"],
)
def test_grid(fields: dict, ctas: int, host) -> None:
    given = host.decode(call(host, stream=77, **fields))
    [[_, grid, threads, shared_bytes, stream]] = of(host, "cudaLaunchKernel")
    assert (grid, threads, shared_bytes, stream) == (ctas, KERNEL_THREADS, SHARED_BYTES, 77)
    assert given["min_tiles_per_cta"] == (1 if "num_ctas" in fields else 2)


@pytest.mark.parametrize("num_ctas", [1, 15, 16, 17, 1000])
def test_workspace(num_ctas: int, host) -> None:
    """Every CTA has a flag and a partial state, no two parts share a line, and nothing lies outside."""
    given = host.decode(call(host, num_ctas=num_ctas, **LARGE))
    assert given["ticket"] == 0
    assert given["flags"] % 128 == given["partials"] % 128 == given["partial_floats"] * 4 % 128 == 0
    assert given["ticket"] + 8 <= given["flags"]
    assert given["flags"] + 8 * num_ctas <= given["partials"]
    assert given["partial_floats"] >= PARTIAL_FLOATS
    assert given["partials"] + 4 * num_ctas * given["partial_floats"] == given["bytes"]


def test_every_launch_has_a_nonce_of_its_own(host) -> None:
    nonces = host.nonces(8, 2000)
    assert len(set(nonces)) == 8 * 2000
    assert all(nonce != 0 and nonce % 2**20 == 0 for nonce in nonces)


@pytest.mark.parametrize(
    ("fields", "aligned"),
    [
        ({}, True),
        ({"data": 16}, True),
        ({"data": 8}, False),
        ({"head_dim": 124}, False),
        ({"block_stride": 2**18 + 4}, False),
        ({"token_stride": 260}, False),
        ({"head_stride": 132}, False),
        # A dimension of size 1 is never stepped over.
        ({"batch": 1, "block_stride": 1}, True),
        ({"tokens": 1, "token_stride": 1}, True),
        ({"kv_heads": 1, "head_stride": 1}, True),
        ({"kv_heads": 1, "token_stride": 1}, False),
        # In bytes: rows of 8-bit elements need strides twice as round.
        ({"quantised": True, "head_dim": 64}, True),
        ({"quantised": True, "head_dim": 64, "token_stride": 264}, False),
    ],
    ids=str,
)
def test_which_rows_are_aligned(fields: dict, aligned: bool, host) -> None:
    assert host.decode(call(host, **fields))["aligned"] is aligned


def test_the_device_is_current_before_the_runtime_is_called(host) -> None:
    host.dispatch(call(host, device=5))
    assert names(host)[:2] == ["guard", "current_stream"]
    assert of(host, "guard") == of(host, "current_stream") == [[5]]
    assert names(host)[-2:] == ["cudaLaunchKernel", "end of guard"]
    assert of(host, "cudaLaunchKernel")[0][-1] == 1000 + 5, "not torch's current stream"


@pytest.mark.parametrize(
    ("failing", "what"),
    [
        ("cudaDeviceGetAttribute", "reading the number of SMs"),
        ("cudaFuncSetAttribute", "allowing the kernel its shared memory"),
        ("cudaOccupancyMaxActiveBlocksPerMultiprocessor", "reading the occupancy"),
        ("cudaLaunchKernel", "launching the kernel"),
    ],
)
def test_failing_calls_of_a_launch(failing: str, what: str, host) -> None:
    host.reset(failing=failing)
    with pytest.raises(RuntimeError, match=f"^lean_attention: {what}: unknown error$"):
        host.decode(call(host))
    assert names(host)[-1] == failing
    host.reset()
    host.decode(call(host))


def test_a_failing_search_for_the_error_record_is_not_remembered(host) -> None:
    device = 40  # that no other test has
    host.reset(failing="cudaGetSymbolAddress")
    with pytest.raises(RuntimeError, match=r"^lean_attention: finding a device variable: unknown error$"):
        host.decode(call(host, device=device))
    assert "cudaLaunchKernel" not in names(host)
    host.reset()
    for _ in range(2):
        host.decode(call(host, device=device))
    assert names(host).count("cudaGetSymbolAddress") == 1


@pytest.mark.parametrize(("major", "minor", "runs"), [(7, 5, False), (8, 0, True), (12, 1, True)])
def test_old_devices_are_refused(major: int, minor: int, runs: bool, host) -> None:
    host.reset(major=major, minor=minor)
    if runs:
        host.decode(call(host, device=1))
    else:
        wanted = r"^decode: cuda:1 has compute capability 7\.5; the kernels need 8\.0 \(Ampere\) or newer$"
        with pytest.raises(RuntimeError, match=wanted):
            host.decode(call(host, device=1))
    assert ("cudaLaunchKernel" in names(host)) is runs


def test_a_device_that_cannot_hold_a_cta_is_refused(host) -> None:
    host.reset(ctas_per_sm=0)
    wanted = r"^decode: an SM of cuda:0 cannot hold the kernel's 70000 bytes of shared memory$"
    with pytest.raises(RuntimeError, match=wanted):
        host.decode(call(host))


@pytest.mark.parametrize("device", [-1, 64, 1000])
def test_devices_beyond_the_limit_are_refused(device: int, host) -> None:
    wanted = f"^lean_attention: the device is cuda:{device}; it must be one of the first 64$"
    for use in (
        lambda: host.decode(call(host, device=device)),
        lambda: host.append_kv(3, False, device, 0),
        lambda: host.take_error(device),
    ):
        with pytest.raises(RuntimeError, match=wanted):
            use()
    assert host.calls() == []
    host.decode(call(host, device=63))


def test_what_no_kernel_is_for_is_refused(host) -> None:
    for fields, wanted in [
        ({"head_dim": 136}, "decode: no CUDA kernel for head_dim 136 and head_dim_v 136"),
        (
            {"head_dim": 72, "quantised": True},
            "decode: no CUDA kernel for head_dim 72 and head_dim_v 72 in quantised caches",
        ),
        ({**LARGE, "num_ctas": 2**20}, "decode: num_ctas is 1048576; on cuda it must be at most 1048575"),
    ]:
        fields = {**fields, **({"tokens": 2**30} if "num_ctas" in fields else {})}
        with pytest.raises(ValueError, match=f"^{wanted}$"):
            host.decode(call(host, **fields))
    assert "cudaLaunchKernel" not in names(host)


def test_a_report_is_told_once_and_is_gone_when_take_error_returns(host) -> None:
    host.report(0)
    host.report(0)
    host.reset()
    text = host.take_error(0)
    assert "decode: seq_lens[0] is 51" in text and text.endswith("(the first of 2 such)")
    assert names(host) == ["cudaDeviceSynchronize", "cudaMemcpy", "cudaMemset", "cudaDeviceSynchronize"]
    assert host.take_error(0) == ""


def test_grids_of_the_other_ops(host) -> None:
    for quantised, tokens, ctas in [(False, 3, 12), (True, 3, 3), (False, 10**6, 4096), (True, 10**6, 4096)]:
        host.reset()
        host.append_kv(tokens, quantised, 0, 78)
        assert of(host, "cudaLaunchKernel")[0][1:] == [ctas, 128, 0, 78]
    for rows, ctas in [(5, 5), (10**6, 4096)]:
        host.reset()
        host.merge_states(128, rows, 79)
        assert of(host, "cudaLaunchKernel")[0][1:] == [ctas, 128, 0, 79]
    with pytest.raises(ValueError, match=r"^merge_states: outs has 129 tensors; on cuda there may be 128$"):
        host.merge_states(129, 5, 0)
