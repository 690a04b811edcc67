"""From one request with resolved defaults to the sequences that the engine generates. Shared by HTTP and Python API."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from tpqwen.errors import RequestError
from tpqwen.request import GenerateRequest, SamplingParams, ThinkingBudget

_MASK64 = (1 << 64) - 1
_seeds = random.Random()  # from the system's entropy once, not for each request

RANGES: dict[str, tuple[float, float, bool]] = {  # parameter -> lowest, highest, whether it must be above the lowest
    "temperature": (0, 2, False),
    "top_k": (-1, 1 << 30, False),
    "top_p": (0, 1, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (0, 100, True),
    "n": (1, 16, False),
    "min_tokens": (0, math.inf, False),
    "max_tokens": (0, math.inf, False),
    "logprobs": (0, 20, False),
    "prompt_logprobs": (0, 20, False),
}


@dataclass(frozen=True)
class Limits:
    """What the model allows. Ids 0 .. vocab_size-1 may be named; end_ids end a sequence unless ignore_eos."""

    max_model_len: int
    vocab_size: int
    end_ids: tuple[int, ...]


def expand(
    request_id: str,
    prompt_ids: list[int],
    params: SamplingParams,
    limits: Limits,
    *,
    priority: int = 0,
    cache_salt: str = "",
    thinking: ThinkingBudget | None = None,
    field: str = "prompt",
) -> list[GenerateRequest]:
    """One GenerateRequest for each of params.n choices; ids are request_id-0, request_id-1, ...

    The choices share a seed and differ in `choice`. Without max_tokens the context is the limit. field: the name that
    errors give to the prompt.
    Raises RequestError: a parameter out of range; a prompt that is empty, over the context, or outside the vocabulary.
    """
    check_ranges(params)
    max_tokens = checked_max_tokens(len(prompt_ids), params, limits, field)
    seed = _seeds.getrandbits(63) if params.seed is None else params.seed & _MASK64
    end_ids: tuple[int, ...] = params.stop_token_ids if params.ignore_eos else (*limits.end_ids, *params.stop_token_ids)
    return [
        GenerateRequest(
            id=f"{request_id}-{choice}",
            prompt_ids=prompt_ids,
            params=params,
            max_tokens=max_tokens,
            seed=seed,
            choice=choice,
            end_ids=tuple(dict.fromkeys(end_ids)) if max_tokens else (),
            priority=priority,
            cache_salt=cache_salt,
            thinking=thinking,
        )
        for choice in range(params.n)
    ]


def check_ranges(params: SamplingParams) -> None:
    """For callers from Python; HTTP's fields have been checked, against the same numbers. Raises RequestError."""
    for name, (low, high, is_open) in RANGES.items():
        value = getattr(params, name)
        if value is not None and not ((value > low if is_open else value >= low) and value <= high):
            text = f"{name} is {value}; it must be {'above' if is_open else 'at least'} {low:g} and at most {high:g}"
            raise RequestError(text, param=name, code="out_of_range")


def checked_max_tokens(num_prompt: int, params: SamplingParams, limits: Limits, field: str = "prompt") -> int:
    """How many tokens the request may produce. Raises RequestError."""
    if num_prompt == 0:
        raise RequestError("the prompt is empty; at least one token is needed", param=field, code="invalid_value")
    room = limits.max_model_len - num_prompt
    wanted = params.max_tokens
    if room < (wanted != 0) or (wanted is not None and wanted > room):
        asked = f" and {wanted} tokens are asked for, {num_prompt + wanted} together" if wanted is not None else ""
        raise RequestError(
            f"the prompt has {num_prompt} tokens{asked}; the context holds {limits.max_model_len}",
            param="max_tokens" if room >= 1 else field,
            code="context_length_exceeded",
        )
    max_tokens = room if wanted is None else wanted
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens {params.min_tokens} is more than the {max_tokens} tokens that may be produced",
            param="min_tokens",
            code="invalid_value",
        )
    return max_tokens
