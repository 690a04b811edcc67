"""The answer as it is made, its reasoning first. Usage: python examples/openai_stream.py [URL]"""

import os
import sys

from openai import OpenAI

url = f"{sys.argv[1]}/v1" if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "What is 17 + 25?"}],
    stream=True,
    stream_options={"include_usage": True},
    temperature=0,
    max_completion_tokens=300,
    extra_body={"chat_template_kwargs": {"enable_thinking": True}},
)
thinking = False
for chunk in stream:
    if not chunk.choices:
        print(f"\n({chunk.usage.completion_tokens} tokens)")
        continue
    delta = chunk.choices[0].delta
    reasoning = getattr(delta, "reasoning", None)
    if reasoning and not thinking:
        print("thinking: ", end="")
    if delta.content and thinking:
        print("\nanswer: ", end="")
    thinking = bool(reasoning) or (thinking and not delta.content)
    print(reasoning or delta.content or "", end="", flush=True)
