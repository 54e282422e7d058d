"""The ops as citizens of PyTorch: opcheck, fake tensors, compile, export, gradients, threads."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import lean_attention
from lean_attention import ops, reference
from tests.cases import DTYPES, SHORT, Case, assert_close, make_inputs, with_int64

# What only one of function, op and definition has.
OWN = {
    "decode": {"out", "lse", "num_ctas", "out_dtype", "dtype"},
    "append_kv": set(),
    "merge_states": {"out_dtype"},
}


@pytest.mark.parametrize("name", OWN)
def test_function_op_and_definition_have_the_same_arguments(name: str) -> None:
    def of(function) -> list[tuple]:
        arguments = inspect.signature(function).parameters.values()
        return [
            (a.name, None if a.default is a.empty else a.default)
            for a in arguments
            if a.name not in OWN[name]
        ]

    function = getattr(lean_attention, name)
    schema = getattr(torch.ops.lean_attn, name).default._schema
    op = [(a.name, a.default_value) for a in schema.arguments]
    assert of(function) == of(getattr(reference, name))
    assert [a for a in op if a[0] not in OWN[name]] == of(function)
    if name == "decode":
        into = [a.name for a in torch.ops.lean_attn.decode_out.default._schema.arguments]
        assert into[:3] + into[5:] == [a for a, _ in op if a != "out_dtype"] and into[3:5] == ["out", "lse"]
    if "out_dtype" in OWN[name]:
        assert op[-1] == ("out_dtype", None)
        assert [*inspect.signature(function).parameters][-1] == "out_dtype"


@pytest.mark.parametrize(
    "case",
    [
        Case(torch.float32, lens=(70, 0, 9), heads=6, head_dim=40, head_dim_v=24),
        Case(torch.float16, lens=(70, 0, 9), heads=6, head_dim=40, head_dim_v=24, q_len=3),
        Case(lens=(70, 0, 9), heads=6, head_dim=40, head_dim_v=24, layout="heads_first"),
    ],
    ids=str,
)
def test_opcheck_decode(case: Case) -> None:
    inputs = make_inputs(case)
    caches = {name: inputs.pop(name).nan_to_num() for name in ("k_cache", "v_cache")}
    arguments = (inputs["q"], caches["k_cache"], caches["v_cache"], inputs["seq_lens"])
    torch.library.opcheck(torch.ops.lean_attn.decode.default, arguments)
    torch.library.opcheck(torch.ops.lean_attn.decode.default, arguments[:3], {"num_ctas": 3, "scale": 0.2})


def test_opcheck_indices_in_int64() -> None:
    inputs = with_int64(make_inputs(Case(torch.float32, q_len="packed", layout="paged", leftpad=True)))
    caches = {name: inputs[name].nan_to_num() for name in ("k_cache", "v_cache")}
    arguments = ("q", "k_cache", "v_cache", "seq_lens", "block_table")
    options = {name: inputs[name] for name in ("cache_leftpad", "cu_seqlens_q")}
    torch.library.opcheck(
        torch.ops.lean_attn.decode.default, [({**inputs, **caches})[name] for name in arguments], options
    )
    k, v = (torch.randn(len(inputs["q"]), 2, 128) for _ in range(2))
    lens, table = torch.zeros(3, dtype=torch.int64), torch.arange(3)[:, None]
    torch.library.opcheck(
        torch.ops.lean_attn.append_kv.default,
        (*caches.values(), k, v, lens, table),
        {"cu_seqlens": inputs["cu_seqlens_q"]},
    )


def test_opcheck_what_benchmarks_compare_with() -> None:
    arguments = tuple(
        tensor.nan_to_num() for tensor in make_inputs(Case(torch.float32, lens=(70, 9))).values()
    )
    torch.library.opcheck(torch.ops.lean_attn.decode_fixed_split.default, arguments, {"splits": 3})
    torch.library.opcheck(torch.ops.lean_attn.read_only.default, arguments)


def test_opcheck_merge_states() -> None:
    outs, lses = [torch.randn(2, 1, 4, 16) for _ in range(3)], [torch.randn(2, 4, 1) for _ in range(3)]
    for options in ({}, {"out_dtype": torch.float16}):
        torch.library.opcheck(torch.ops.lean_attn.merge_states.default, (outs, lses), options)


def test_fake_tensors_on_cuda_without_a_gpu() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(2, 50, 2, dim, dtype=torch.bfloat16, device="cuda") for dim in (64, 128))
        out, lse = lean_attention.decode(q, k, v, torch.empty(2, dtype=torch.int32, device="cuda"))
    assert (out.shape, out.dtype, out.device.type) == ((2, 1, 8, 128), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == ((2, 8, 1), torch.float32, "cuda")


def test_fake_tensors_of_wrong_rank_are_refused_when_traced() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="k_cache has shape"):
        lean_attention.decode(torch.empty(2, 1, 8, 64), torch.empty(2, 50, 64), torch.empty(2, 50, 2, 64))


def attend_and_scale(q, k_cache, v_cache, seq_lens):
    """A piece of model code: the op between other operations."""
    out, lse = torch.ops.lean_attn.decode(q * 1.5, k_cache, v_cache, seq_lens)
    return out.flatten(2) + 1, lse.exp()


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_compile_fullgraph(dtype: torch.dtype) -> None:
    inputs = tuple(make_inputs(Case(dtype, lens=(70, 9))).values())
    compiled = torch.compile(attend_and_scale, fullgraph=True)
    for got, want in zip(compiled(*inputs), attend_and_scale(*inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_compile_once_for_all_batches_and_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(attend_and_scale, fullgraph=True, dynamic=True, backend=counter)
    # Batch sizes that are no head count: dynamic shapes begin by taking equal sizes for the same one.
    for lens in ((70, 9, 1), (5, 6, 7, 0, 2), (300, 0, 2, 8, 1, 1, 40)):
        inputs = tuple(make_inputs(Case(torch.float32, lens=lens)).values())
        for got, want in zip(compiled(*inputs), attend_and_scale(*inputs), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_compile_in_place_cache_update() -> None:
    """The decode step of a model: write the new token, then attend to all."""

    def step(q, k_new, v_new, k_cache, v_cache, seq_lens):
        batch = torch.arange(q.shape[0])
        k_cache[batch, seq_lens.long()] = k_new
        v_cache[batch, seq_lens.long()] = v_new
        return lean_attention.decode(q, k_cache, v_cache, seq_lens + 1)[0]

    case = Case(torch.float32, lens=(20, 0))
    inputs = make_inputs(case)
    new = torch.randn(2, 2, case.kv_heads, case.head_dim)
    compiled = torch.compile(step, fullgraph=True)
    caches = [inputs[name].clone() for name in ("k_cache", "v_cache")]
    out = compiled(inputs["q"], *new, *caches, inputs["seq_lens"])
    want = step(inputs["q"], *new, inputs["k_cache"], inputs["v_cache"], inputs["seq_lens"])
    torch.testing.assert_close(out, want)


class Layer(torch.nn.Module):
    def forward(self, q, k_cache, v_cache, seq_lens):
        return lean_attention.decode(q, k_cache, v_cache, seq_lens, window_left=30)[0]


def test_export_with_dynamic_batch_and_length() -> None:
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=4096)
    cache = {0: batch, 1: tokens}
    exported = torch.export.export(
        Layer(),
        tuple(make_inputs(Case(torch.float32, lens=(70, 9))).values()),
        dynamic_shapes={"q": {0: batch}, "k_cache": cache, "v_cache": cache, "seq_lens": {0: batch}},
    )
    assert "lean_attn.decode.default" in str(exported.graph)
    inputs = tuple(make_inputs(Case(torch.float32, lens=(300, 5, 0))).values())
    torch.testing.assert_close(exported.module()(*inputs), Layer()(*inputs))


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_asking_for_a_gradient_raises(compiled: bool) -> None:
    inputs = make_inputs(Case(torch.float32, lens=(70, 9)))
    inputs["k_cache"] = inputs["k_cache"].nan_to_num().requires_grad_()
    function = torch.compile(lean_attention.decode) if compiled else lean_attention.decode
    with pytest.raises(RuntimeError, match=r"lean_attention.decode has no gradient.*torch.no_grad"):
        function(**inputs)[0].sum().backward()
    with torch.no_grad():
        assert not lean_attention.decode(**inputs)[0].requires_grad


def test_asking_merge_states_for_a_gradient_raises() -> None:
    out = torch.randn(1, 1, 1, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"lean_attention.merge_states has no gradient"):
        lean_attention.merge_states([out], [torch.zeros(1, 1, 1)])[0].sum().backward()


def test_threads_do_not_disturb_each_other() -> None:
    case = Case(torch.bfloat16, lens=(900, 31), heads=8, kv_heads=2)
    inputs = [make_inputs(case) for _ in range(4)]
    results: list = [None] * len(inputs)

    def work(i: int) -> None:
        for _ in range(30):
            results[i] = lean_attention.decode(**inputs[i], num_ctas=3 + i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given, result in zip(inputs, results, strict=True):
        assert_close(case, given, *result)


@pytest.mark.slow
def test_compiled_into_a_cache_inside_another_tensor() -> None:
    """PyTorch's compiler before 2.13 loses where it begins, and so the op refuses."""
    pool, k, v = torch.randn(2, 2, 50, 2, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    seq_lens = torch.tensor([3, 40], dtype=torch.int32)
    before, want = pool.clone(), pool.clone()
    lean_attention.append_kv(want[0], want[1], k, v, seq_lens)
    compiled = torch.compile(lean_attention.append_kv)
    if ops._COMPILER_LOSES_OFFSETS:
        with pytest.raises(Exception, match="v_cache begins 3200 elements into its storage"):
            compiled(pool[0], pool[1], k, v, seq_lens)
        assert torch.equal(pool, before)
    else:
        compiled(pool[0], pool[1], k, v, seq_lens)
        assert torch.equal(pool, want)
