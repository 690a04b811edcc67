"""LangChain's chat model over this server. Usage: python examples/langchain_chat.py [URL]

Needs `pip install langchain-openai`.
"""

import os
import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

url = f"{sys.argv[1]}/v1" if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
key = os.environ.get("OPENAI_API_KEY", "none")
model = OpenAI(base_url=url, api_key=key).models.list().data[0].id
chat = ChatOpenAI(
    base_url=url,
    api_key=key,
    model=model,
    temperature=0,
    max_tokens=100,
    extra_body={"chat_template_kwargs": {"enable_thinking": False}},
)
chain = ChatPromptTemplate.from_messages([("system", "You are a calculator."), ("user", "What is {a} + {b}?")]) | chat
print(chain.invoke({"a": 17, "b": 25}).content)
print("".join(chunk.content for chunk in chain.stream({"a": 8, "b": 9})))
