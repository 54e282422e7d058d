"""A small model over four processes: its heads are sharded over two of them, its tokens over two.

    torchrun --standalone --nproc-per-node 4 examples/context_parallel.py

The processes are a mesh of two rows and two columns. Each has the heads of its row (tensor parallelism)
and, of their K and V, the tokens of its column (context parallelism). They must generate what one process
does with PyTorch's own attention, the same weights and no cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import lean_attention
from lean_attention import distributed

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 512, 256, 2, 8, 4, 32, 512
PROMPTS, NEW_TOKENS, BLOCK = (100, 77), 24, 16
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> out


def make_weights() -> dict[str, Tensor]:
    """The same on all processes."""
    torch.manual_seed(0)
    sizes = {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN)}
    sizes |= {"v": sizes["k"], "o": (HIDDEN, HEADS * HEAD_DIM)}
    sizes |= {"gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}
    weights = {
        f"{name}{i}": torch.randn(size) / size[1] ** 0.5
        for i in range(LAYERS)
        for name, size in sizes.items()
    }
    for name in ("embed", "head"):
        weights[name] = torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5
    return weights


def shard_heads(weights: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What a process multiplies with: rows of what leads to heads, columns of what leads from them."""

    def own(name: str, weight: Tensor) -> Tensor:
        if name in ("embed", "head"):
            return weight
        return weight.chunk(ranks, dim=1 if name[:-1] in ("o", "down") else 0)[rank]

    return {name: own(name, weight) for name, weight in weights.items()}


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding; x is [batch, tokens, heads, dim], positions [batch, tokens]."""
    angles = positions[..., None, None] * 10000 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def forward(
    weights: dict[str, Tensor],
    tokens: Tensor,
    positions: Tensor,
    attend: Attend,
    add: Callable[[Tensor], Tensor],
) -> Tensor:
    """Logits of tokens at these positions, both [batch, tokens]; `add` sums over those with other heads."""
    x = weights["embed"][tokens]
    for i in range(LAYERS):
        y = F.rms_norm(x, (HIDDEN,))
        q, k, v = (F.linear(y, weights[f"{name}{i}"]).unflatten(-1, (-1, HEAD_DIM)) for name in "qkv")
        out = attend(i, rotate(q, positions), rotate(k, positions), v)
        x = x + add(F.linear(out.flatten(2), weights[f"o{i}"]))
        y = F.rms_norm(x, (HIDDEN,))
        y = F.silu(F.linear(y, weights[f"gate{i}"])) * F.linear(y, weights[f"up{i}"])
        x = x + add(F.linear(y, weights[f"down{i}"]))
    return F.linear(F.rms_norm(x, (HIDDEN,)), weights["head"])


def generate_in_one_process(weights: dict[str, Tensor], prompts: list[Tensor]) -> list[list[int]]:
    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    generated = []
    for prompt in prompts:
        tokens = prompt
        for _ in range(NEW_TOKENS):
            positions = torch.arange(len(tokens))[None]
            logits = forward(weights, tokens[None], positions, attend, lambda x: x)
            tokens = torch.cat([tokens, logits[0, -1:].argmax(-1)])
        generated.append(tokens[len(prompt) :].tolist())
    return generated


def generate_sharded(weights: dict[str, Tensor], prompts: list[Tensor]) -> list[list[int]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("heads", "tokens"))
    heads, tokens = mesh.get_group("heads"), mesh.get_group("tokens")
    rank, ranks = tokens.rank(), tokens.size()
    weights = shard_heads(weights, heads.rank(), heads.size())
    shards = distributed.RoundRobin(BLOCK)
    batch = len(prompts)
    lens = torch.tensor([len(prompt) - 1 for prompt in prompts])  # the last token is the first step's
    capacity = int(shards.local_lens(lens + NEW_TOKENS, 0, ranks).max())
    shape = (LAYERS, batch, capacity, KV_HEADS // heads.size(), HEAD_DIM)
    k_caches, v_caches = torch.zeros(shape), torch.zeros(shape)

    def add(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=heads)
        return x

    def read_prompt(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for cache, new in ((k_caches, k), (v_caches, v)):
            cache[layer, :, : new.shape[1]] = new
        return distributed.prefill(q, k, v, local_lens, shards=shards, group=tokens)[0]

    def step(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own_caches = k_caches[layer], v_caches[layer]
        local = shards.local_tokens(lens, rank, ranks)  # -1: another process keeps the new token
        slots = torch.where(local < 0, -1, torch.arange(batch) * capacity + local)
        lean_attention.append_kv(*own_caches, k[:, 0], v[:, 0], slot_mapping=slots)
        now = shards.local_lens(lens + 1, rank, ranks)
        return distributed.decode(q, *own_caches, now, shards=shards, group=tokens)[0]

    # Each process reads the tokens of the prompts that are its own; all pad to one shape.
    local_lens = shards.local_lens(lens, rank, ranks)
    longest = int(shards.local_lens(lens, 0, ranks).max())
    positions = distributed.Placement.round_robin(local_lens, BLOCK, rank, ranks).positions(longest)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    own = padded.gather(1, positions.clamp(max=padded.shape[1] - 1))
    forward(weights, own, positions, read_prompt, add)

    last = torch.stack([prompt[-1] for prompt in prompts])[:, None]
    generated = []
    for _ in range(NEW_TOKENS):
        last = forward(weights, last, lens[:, None], step, add).argmax(-1)
        lens += 1
        generated.append(last)
    return torch.cat(generated, dim=1).tolist()


def main() -> None:
    dist.init_process_group("gloo")
    weights = make_weights()
    prompts = [torch.randint(VOCABULARY, (length,)) for length in PROMPTS]
    with torch.inference_mode():
        got = generate_sharded(weights, prompts)
        if dist.get_rank() == 0:
            want = generate_in_one_process(weights, prompts)
            for prompt, tokens in zip(prompts, got, strict=True):
                print(f"after {len(prompt)} tokens, over 4 processes: {tokens}")
            print(f"in one process: {'the same tokens' if got == want else want}")
            assert got == want, "the tokens differ"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
