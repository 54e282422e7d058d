"""The CPU backend in the surroundings that users put it in: thread limits, workers, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import lean_attention
from tests.cases import Case, assert_close, make_inputs

CASE = Case(torch.bfloat16, lens=(3000, 12, 0), heads=8, kv_heads=2)


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.usefixtures("count_is_restored")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_follows_torch_set_num_threads(threads: int) -> None:
    inputs = make_inputs(CASE)
    torch.set_num_threads(threads)
    for num_ctas in (0, 1, 3, 64):
        assert_close(CASE, inputs, *lean_attention.decode(**inputs, num_ctas=num_ctas))


@pytest.mark.usefixtures("count_is_restored")
@pytest.mark.parametrize(("tokens", "num_ctas"), [(400, 1), (3000, 3)])
def test_the_count_of_threads_does_not_change_results(tokens: int, num_ctas: int) -> None:
    """Bitwise, for a given grid: also not by how many heads of an NHD (tokens first) cache one pass takes."""
    inputs = make_inputs(Case(torch.bfloat16, lens=(tokens,), heads=32, kv_heads=8, head_dim=64))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(lean_attention.decode(**inputs, num_ctas=num_ctas))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.usefixtures("count_is_restored")
@pytest.mark.parametrize(
    ("threads", "layout"), [(2, "tokens_first"), (3, "heads_first"), (16, "tokens_first")]
)
def test_threads_that_take_many_ranges(threads: int, layout: str) -> None:
    """22 MB, so that ranges grow shorter; more threads than cores, which wait for each other."""
    case = Case(torch.float32, lens=(9000, 1, 0, 2000), heads=8, layout=layout)
    inputs = make_inputs(case)
    torch.set_num_threads(threads)
    out, lse = lean_attention.decode(**inputs)
    assert_close(case, inputs, out, lse)
    for _ in range(20):
        again = lean_attention.decode(**inputs)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_one_openmp_thread() -> None:
    """More lean ranges than threads: a host block may wait only for what has been taken before."""
    code = """
        import torch, lean_attention
        assert torch.get_num_threads() == 1
        q, k = torch.randn(2, 1, 8, 64), torch.randn(2, 5000, 2, 64)
        out, _ = lean_attention.decode(q, k, k, num_ctas=9)
        assert torch.allclose(out, lean_attention.reference.decode(q, k, k)[0].float(), atol=1e-5)
    """
    run_python(code, OMP_NUM_THREADS="1")


def test_in_a_data_loader_worker() -> None:
    code = """
        import torch, lean_attention

        class Decodes(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, i):
                q, k = torch.randn(1, 1, 8, 64), torch.randn(1, 5000, 2, 64)
                want = lean_attention.reference.decode(q, k, k)[0].float()
                return (lean_attention.decode(q, k, k, num_ctas=4)[0] - want).abs().max()

        if __name__ == "__main__":
            loader = torch.utils.data.DataLoader(Decodes(), num_workers=2)
            assert max(float(error) for error in loader) < 1e-5
    """
    run_python(code)


def test_after_a_fork() -> None:
    """In a child process of one that has decoded, where OpenMP's threads are gone."""
    code = """
        import os, torch, lean_attention
        q, k = torch.randn(2, 1, 8, 64), torch.randn(2, 5000, 2, 64)
        torch.set_num_threads(2)
        want, _ = lean_attention.decode(q, k, k)
        child = os.fork()
        if child == 0:
            out, _ = lean_attention.decode(q, k, k)
            os._exit(0 if torch.allclose(out, want, atol=1e-5) else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0
    """
    run_python(code)


def test_the_interpreter_runs_on_while_it_decodes() -> None:
    """The GIL is released: another Python thread makes progress during a long call."""
    code = """
        import threading, time, torch, lean_attention
        torch.set_num_threads(1)
        k = torch.randn(1, 2**19, 1, 64)
        q = torch.randn(1, 1, 64, 64)
        lean_attention.decode(q, k, k)
        longest, done = 0.0, threading.Event()

        def tick():
            global longest
            last = time.perf_counter()
            while not done.is_set():
                time.sleep(0.001)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now

        thread = threading.Thread(target=tick)
        thread.start()
        begin = time.perf_counter()
        for _ in range(5):
            lean_attention.decode(q, k, k)
        one_call = (time.perf_counter() - begin) / 5
        done.set()
        thread.join()
        print(one_call, longest)
        assert longest < 0.9 * one_call or one_call < 0.02
    """
    run_python(code)
