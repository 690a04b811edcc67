"""A prompt in an answer: echoed as text, and its tokens' log-probabilities in OpenAI's and in vLLM's shape."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpqwen.request import TokenLogprob
from tpqwen.text.vocabulary import Vocabulary

_LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(frozen=True)
class EchoedPrompt:
    """offsets: characters of the text that stand before each token."""

    ids: list[int]
    text: str
    offsets: list[int]

    @staticmethod
    def of(vocabulary: Vocabulary, ids: list[int]) -> EchoedPrompt:
        """Every token shown, special ones too: the prompt as it was sent."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces, offsets, length = [], [], 0
        for token_id in ids:
            offsets.append(length)
            pieces.append(decoder.decode(vocabulary.bytes_of(token_id)))
            length += len(pieces[-1])
        pieces.append(decoder.decode(b"", final=True))
        return EchoedPrompt(ids, "".join(pieces), offsets)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB) if math.isfinite(logprob) else _LEAST_LOGPROB


def token_name(vocabulary: Vocabulary, token_id: int) -> str:
    """A token as text, or as its bytes when it is no whole character: different tokens have different names."""
    raw = vocabulary.bytes_of(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def likeliest(score: TokenLogprob, token_id: int, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest ids with their log-probabilities, best first, then the token itself if it is none."""
    top = [(i, finite(p)) for i, p in zip(score.top_ids[:count], score.top_logprobs, strict=False)]
    return top if any(i == token_id for i, _ in top) else [*top, (token_id, finite(score.logprob))]


def legacy_logprobs(
    vocabulary: Vocabulary, ids: Sequence[int], scores: Sequence[TokenLogprob], offsets: Sequence[int], count: int
) -> dict[str, Any]:
    """OpenAI's logprobs object of completions. scores may begin later than ids: the first ids then have null."""
    unknown: list[None] = [None] * (len(ids) - len(scores))
    scored = list(zip(scores, ids[len(unknown) :], strict=True))
    return {
        "tokens": [token_name(vocabulary, i) for i in ids],
        "token_logprobs": [*unknown, *(finite(s.logprob) for s in scores)],
        "top_logprobs": [
            *unknown,
            *({token_name(vocabulary, t): p for t, p in likeliest(s, i, count)} for s, i in scored),
        ],
        "text_offset": list(offsets),
    }


def prompt_logprobs(
    vocabulary: Vocabulary, ids: Sequence[int], scores: Sequence[TokenLogprob] | None, count: int
) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: null for the first token, then id -> logprob, rank among the listed, text."""
    out: list[dict[str, Any] | None] = [None]
    for token_id, score in zip(ids[1:], scores or (), strict=True):
        ranks = {t: n for n, t in enumerate(score.top_ids[:count], 1)}
        out.append(
            {
                str(t): {"logprob": p, "rank": ranks.get(t), "decoded_token": token_name(vocabulary, t)}
                for t, p in likeliest(score, token_id, count)
            }
        )
    return out
