"""A conversation through OpenAI's Responses API: what was answered is sent back with the next question.

Usage: python examples/openai_responses.py [URL]
"""

import os
import sys

from openai import OpenAI

url = f"{sys.argv[1]}/v1" if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id
conversation = []
for question in ("What is 17 + 25?", "What is 8 + 9?"):
    conversation.append({"role": "user", "content": question})
    response = client.responses.create(
        model=model,
        instructions="You are a calculator.",
        input=conversation,
        temperature=0,
        max_output_tokens=100,
        reasoning={"effort": "none"},
    )
    conversation += [item.model_dump(exclude_none=True) for item in response.output]
    print(question, "->", response.output_text)
