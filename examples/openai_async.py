"""Several questions at once, answered in one batch. Usage: python examples/openai_async.py [URL]"""

import asyncio
import os
import sys

from openai import AsyncOpenAI

QUESTIONS = ["What is 17 + 25?", "Count from 3 to 7.", "Hello!"]


async def main(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        model = (await client.models.list()).data[0].id

        async def ask(question: str) -> str:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_completion_tokens=100,
                extra_body={"chat_template_kwargs": {"enable_thinking": False}},
            )
            return answer.choices[0].message.content or ""

        for question, answer in zip(QUESTIONS, await asyncio.gather(*map(ask, QUESTIONS)), strict=True):
            print(question, "->", answer)


url = f"{sys.argv[1]}/v1" if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
asyncio.run(main(url))
