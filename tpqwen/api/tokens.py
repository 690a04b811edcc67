"""/tokenize, /detokenize and Anthropic's count_tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from tpqwen.api.body import LongBodies, read_json
from tpqwen.api.calls import chat_work, check_model
from tpqwen.api.exchange import Exchange
from tpqwen.api.fields import DETOKENIZE, TOKENIZE, TOKENIZE_CHAT, validate
from tpqwen.api.info import ApiSettings, ModelInfo
from tpqwen.api.messages import read_count
from tpqwen.api.prompts import EchoedPrompt, token_name
from tpqwen.api.tool_shapes import tools_of
from tpqwen.api.translation import client_names
from tpqwen.errors import RequestError
from tpqwen.text.chat import ChatFormat
from tpqwen.text.work import PromptWork, TextService, Work


class TokenRoutes:
    """Handlers that need the tokenizer and no engine."""

    def __init__(
        self, text: ChatFormat, service: TextService, info: ModelInfo, settings: ApiSettings, long: LongBodies
    ) -> None:
        self._text = text
        self._service = service
        self._info = info
        self._settings = settings
        self._long = long

    async def tokenize(self, exchange: Exchange) -> None:
        """Ids of a text or of a conversation as the model would get it, of any length."""
        work, strings = await self._read(exchange, self._read_tokenize)
        ids = (await self._service.render(work, limited=False)).prompts[0]
        body: dict[str, Any] = {"count": len(ids), "max_model_len": self._info.limits.max_model_len, "tokens": ids}
        if strings:
            vocabulary = self._text.vocabulary
            body["token_strs"] = await asyncio.to_thread(lambda: [token_name(vocabulary, i) for i in ids])
        await exchange.reply_json(body)

    async def count_tokens(self, exchange: Exchange) -> None:
        """Anthropic's: the prompt of a message, as /v1/messages would render it."""
        call = await self._read(exchange, lambda body: read_count(body, self._info))
        with client_names(call.names):
            rendered = await self._service.render(call.work, limited=False)
        await exchange.reply_json({"input_tokens": rendered.longest})

    async def detokenize(self, exchange: Exchange) -> None:
        """The text of ids, special tokens included."""
        ids = await self._read(exchange, self._read_detokenize)
        echoed = await asyncio.to_thread(EchoedPrompt.of, self._text.vocabulary, ids)
        await exchange.reply_json({"prompt": echoed.text})

    async def _read(self, exchange: Exchange, read: Any) -> Any:
        most = self._settings.max_body_bytes
        return await read_json(exchange.headers, exchange.receive, most, read=read, long=self._long)

    def _read_tokenize(self, body: dict[str, Any]) -> tuple[Work, bool]:
        values = validate(TOKENIZE, body)
        check_model(values, self._info)
        prompt, messages = values.get("prompt"), values.get("messages")
        if (prompt is None) == (messages is None):
            raise RequestError("either prompt or messages is needed", param="prompt", code="missing_field")
        only_chat = values.keys() & {f.name for f in TOKENIZE_CHAT}
        if prompt is not None and only_chat:
            name = min(only_chat)
            raise RequestError(f"{name} goes with messages", param=name, code="invalid_value")
        work: Work = PromptWork(prompts=[prompt]) if prompt is not None else chat_work(values, tools_of(values))
        return work, values.get("return_token_strs", False)

    def _read_detokenize(self, body: dict[str, Any]) -> list[int]:
        values = validate(DETOKENIZE, body)
        check_model(values, self._info)
        ids: list[int] = values["tokens"]
        size = self._info.limits.vocab_size
        if ids and max(ids) >= size:
            raise RequestError(
                f"tokens names {max(ids)}; the vocabulary has {size}", param="tokens", code="invalid_value"
            )
        return ids
