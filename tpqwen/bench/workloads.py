"""The named offline workloads. Prompts are random token ids, the same for every engine and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

MAX_ID = 10000


@dataclass(frozen=True)
class Workload:
    """Prompts with their exact output lengths; end tokens are ignored."""

    prompts: list[list[int]]
    max_tokens: list[int]
    temperature: float = 0.6

    @property
    def output_tokens(self) -> int:
        return sum(self.max_tokens)


def fixed(batch: int, n_in: int, n_out: int, seed: int, temperature: float = 0.6) -> Workload:
    """`batch` requests, all of one shape."""
    random = Random(seed)
    prompts = [[random.randint(0, MAX_ID) for _ in range(n_in)] for _ in range(batch)]
    return Workload(prompts, [n_out] * batch, temperature)


def nano(seed: int) -> Workload:
    """nano-vLLM's benchmark: 256 requests, 100-1024 tokens in, 100-1024 out."""
    random = Random(seed)
    prompts = [[random.randint(0, MAX_ID) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    return Workload(prompts, [random.randint(100, 1024) for _ in range(256)])


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "seed_100x50": lambda s: fixed(100, 32, 50, s),
    "nano_256": nano,
    "decode_bs1": lambda s: fixed(1, 128, 512, s),
    "decode_bs1_greedy": lambda s: fixed(1, 128, 512, s, 0.0),
    "decode_bs32": lambda s: fixed(32, 128, 256, s),
    "decode_bs256": lambda s: fixed(256, 128, 256, s),
    "long_8x16k": lambda s: fixed(8, 16384, 128, s),
    "prefill_1x8k": lambda s: fixed(1, 8192, 1, s),
    "prefill_32x2k": lambda s: fixed(32, 2048, 1, s),
}
