"""One question through OpenAI's client, with what the answer cost. Usage: python examples/openai_sync.py [URL]"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
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
