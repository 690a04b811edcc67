"""Prompts of Qwen3-Embedding and Qwen3-Reranker checkpoints, as their model cards make them."""

from __future__ import annotations

from tpqwen.errors import ConfigError, RequestError
from tpqwen.text.vocabulary import TextModel

END_OF_TEXT = "<|endoftext|>"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def embedding_ids(model: TextModel, text: str | list[int]) -> list[int]:
    """Ids of one input, the end token last. Control tokens in a text stay text.

    Raises RequestError when the tokenizer has no end token.
    """
    end = model.vocabulary.control.get(END_OF_TEXT)
    if end is None:
        raise RequestError(f"the tokenizer has no {END_OF_TEXT}, which ends the input of an embedding model")
    ids = model.encode_plain(text) if isinstance(text, str) else list(text)
    return ids if ids and ids[-1] == end else [*ids, end]


class RerankPrompts:
    """Prompts that ask whether a document answers a query; the answer is P(yes) against P(no) of the next token."""

    def __init__(self, model: TextModel) -> None:
        """Raises ConfigError when "yes" and "no" are no single tokens of this tokenizer."""
        self._model = model
        self._before, self._after = model.encode(_BEFORE), model.encode(_AFTER)
        answers = [model.encode(word) for word in ("yes", "no")]
        if any(len(ids) != 1 for ids in answers):
            raise ConfigError("the tokenizer of a reranker needs 'yes' and 'no' as single tokens")
        self.yes_no = (answers[0][0], answers[1][0])

    def ids(self, query: str, document: str, instruction: str, most: int) -> list[int]:
        """At most `most` tokens: what is too long is cut in the middle part, never before or after it."""
        text = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        room = most - len(self._before) - len(self._after)
        if room < 1:
            message = f"the context of {most} tokens is too short for a reranker's prompt"
            raise RequestError(message, param="documents", code="context_length_exceeded")
        return [*self._before, *self._model.encode_plain(text)[:room], *self._after]
