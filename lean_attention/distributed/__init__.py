"""One sequence over many devices: context-parallel attention over `torch.distributed` process groups.

Each rank holds some tokens of every sequence. A step attends to them and merges the ranks' states.
"""

from lean_attention.distributed.attention import check_group, decode, prefill
from lean_attention.distributed.placement import Placement, RoundRobin

__all__ = ["Placement", "RoundRobin", "check_group", "decode", "prefill"]
