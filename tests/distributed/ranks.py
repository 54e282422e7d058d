"""Runs a function in processes of one gloo group, within a time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported all this forks the ranks: they begin in a tenth of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "lean_attention.distributed", __name__])

DIED = "died"
TIME_OUT = timedelta(seconds=30)


def run(ranks: int, function: Callable, *arguments, seconds: float = 60, time_out=TIME_OUT) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each rank; DIED for one that ends without returning.

    An exception on any rank fails the test, and so does a rank that is still running after `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder, "arguments"))
        processes = [
            _context.Process(target=_rank, args=(rank, ranks, folder, function, time_out))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        while any(p.is_alive() for p in processes) and time.monotonic() < end:
            wait([p.sentinel for p in processes if p.is_alive()], timeout=max(end - time.monotonic(), 0))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
        for process in processes:
            process.join()
        assert not late, f"ranks {late} of {ranks} were still running after {seconds} s"
        results = [_result(Path(folder, str(rank))) for rank in range(ranks)]
    failures = [f"rank {rank}:\n{each[1]}" for rank, each in enumerate(results) if not each[0]]
    codes = [process.exitcode for process in processes]
    assert not failures, "\n".join([*failures, f"the ranks' exit codes: {codes}"])
    return [each[1] for each in results]


def _result(path: Path) -> tuple[bool, Any]:
    return torch.load(path, weights_only=False) if path.exists() else (True, DIED)


def _rank(rank: int, ranks: int, folder: str, function: Callable, time_out: timedelta) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    arguments = torch.load(Path(folder, "arguments"), weights_only=False)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=time_out
    )
    try:
        with torch.inference_mode():
            result = True, function(rank, *arguments)
    except BaseException:
        result = False, traceback.format_exc()
    torch.save(result, Path(folder, f"{rank}.part"))
    Path(folder, f"{rank}.part").rename(Path(folder, str(rank)))
    os._exit(0)  # a group whose other ranks have died may not be taken down
