"""A question that needs a function: the model asks for it, we run it, the model answers.

Usage: python examples/openai_tools.py [URL]
"""

import json
import os
import sys

from openai import OpenAI

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def get_weather(city: str) -> str:
    return json.dumps({"city": city, "temperature": 21, "condition": "sunny"})


url = f"{sys.argv[1]}/v1" if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
options = {
    "model": client.models.list().data[0].id,
    "tools": [WEATHER],
    "temperature": 0,
    "max_completion_tokens": 100,
    "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
}
asked = client.chat.completions.create(messages=messages, tool_choice="required", **options).choices[0].message
messages.append(asked.model_dump(exclude_none=True))
for call in asked.tool_calls:
    print("call:", call.function.name, call.function.arguments)
    result = get_weather(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print("answer:", client.chat.completions.create(messages=messages, **options).choices[0].message.content)
