"""Anthropic's client against this server, streamed. Usage: python examples/anthropic_messages.py [URL]"""

import os
import sys

from anthropic import Anthropic

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ANTHROPIC_BASE_URL", "http://127.0.0.1:8000")
client = Anthropic(base_url=url, api_key=os.environ.get("ANTHROPIC_API_KEY", "none"))
model = client.models.list().data[0].id
question = {"role": "user", "content": "What is 17 + 25?"}
tokens = client.messages.count_tokens(model=model, messages=[question]).input_tokens
print(f"({tokens} tokens in)")
with client.messages.stream(
    model=model,
    max_tokens=200,
    extra_body={"temperature": 0},
    thinking={"type": "disabled"},
    messages=[question],
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print(f"\n({stream.get_final_message().stop_reason})")
