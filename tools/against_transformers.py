"""Continuous batching against transformers' generate, on the same random weights in one run: ratios for docs/LOG.md.

    python tools/against_transformers.py --layers 28 --requests 16 --tokens 16

The model has Qwen3-0.6B's shapes with a smaller vocabulary (--vocab), fp32 on a CPU; transformers runs one request at a
time with its own KV cache, tpqwen the same requests one at a time and all at once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from random import Random

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tpqwen.config import Config
from tpqwen.offline import OfflineEngine
from tpqwen.request import SamplingParams


def main() -> None:
    """Print one line per way of generating."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 28), ("requests", 16), ("tokens", 16), ("prompt", 32), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    random = Random(0)
    prompts = [[random.randrange(args.vocab) for _ in range(args.prompt)] for _ in range(args.requests)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _save(folder, args.layers, args.vocab)
        expected, one_by_one = _transformers(model, prompts, args.tokens)
        del model
        engine = OfflineEngine(Config.load({"model": str(folder), "device": "cpu", "prefix_cache": False}, {}))
        _ours(engine, prompts[:1], 2)
        alone = [_ours(engine, [p], args.tokens) for p in prompts[:4]]
        together, batched = _ours(engine, prompts, args.tokens)
        engine.close()
    single = sum(s for _, s in alone) * len(prompts) / len(alone)
    agree = sum(a == b for a, b in zip(together, expected, strict=True))
    print(f"{torch.get_num_threads()} threads, {args.layers} layers, {len(prompts)} requests of {args.tokens} tokens")
    print(f"transformers, one at a time   {one_by_one:8.2f} s   1.00x")
    print(f"tpqwen, one at a time         {single:8.2f} s   {one_by_one / single:.2f}x  (measured on {len(alone)})")
    print(f"tpqwen, all at once           {batched:8.2f} s   {one_by_one / batched:.2f}x")
    print(f"greedy answers equal to transformers: {agree} of {len(prompts)}")


def _save(folder: Path, layers: int, vocab: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = Qwen3Config(
        vocab_size=vocab,
        num_hidden_layers=layers,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=None,
        **shape,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def _transformers(model: Qwen3ForCausalLM, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    def one(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return out[0, len(prompt) :].tolist()

    one(prompts[0], 2)
    begin = time.perf_counter()
    answers = [one(p, tokens) for p in prompts]
    return answers, time.perf_counter() - begin


def _ours(engine: OfflineEngine, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = [engine.request(p, params) for p in prompts]
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    begin = time.perf_counter()
    for deltas in engine.run(requests):
        for d in deltas:
            answers[d.id] += d.token_ids
    return [answers[r.id] for r in requests], time.perf_counter() - begin


if __name__ == "__main__":
    main()
