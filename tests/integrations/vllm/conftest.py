from __future__ import annotations

import importlib.util
import os

# vLLM runs in a process of its own otherwise, where tests could not look.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# engines.py chooses whose attention serves; test_serving.py has vLLM load the plugin.
os.environ["VLLM_PLUGINS"] = ""
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# `make test-vllm` has an environment with vLLM.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
