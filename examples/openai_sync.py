"""One question through OpenAI's client, with what the answer cost. Usage: python examples/openai_sync.py [URL]"""

import os
import sys

from openai import OpenAI

url = f"{sys.argv[1]}/v1" if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What can you do?"}],
    temperature=0,
    max_completion_tokens=200,
    extra_body={"chat_template_kwargs": {"enable_thinking": False}},
)
print(answer.choices[0].message.content)
print(answer.usage.prompt_tokens, "tokens in,", answer.usage.completion_tokens, "out")
