"""An answer that must be JSON of a schema. Usage: python examples/openai_json_schema.py [URL]"""

import os
import sys

from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


url = f"{sys.argv[1]}/v1" if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
answer = client.chat.completions.parse(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Give me JSON with name and age: Maria is 34 years old."}],
    response_format=Person,
    temperature=0,
    max_completion_tokens=100,
    extra_body={"chat_template_kwargs": {"enable_thinking": False}},
)
person = answer.choices[0].message.parsed
print(type(person).__name__, person.name, person.age)
