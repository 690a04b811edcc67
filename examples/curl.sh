#!/bin/sh
# The API by hand: whole, streamed, and what a prompt looks like in tokens. Usage: sh examples/curl.sh [URL]
set -eu
url=${1:-http://127.0.0.1:8000}
json='content-type: application/json'
question='[{"role": "user", "content": "What is 17 + 25?"}]'
quiet='"chat_template_kwargs": {"enable_thinking": false}, "temperature": 0, "max_tokens": 100'

curl -sS --fail-with-body "$url/v1/models"; echo
curl -sS --fail-with-body "$url/v1/chat/completions" -H "$json" -d "{\"messages\": $question, $quiet}"; echo
curl -sS --fail-with-body -N "$url/v1/chat/completions" -H "$json" -d "{\"messages\": $question, $quiet, \"stream\": true}"
curl -sS --fail-with-body "$url/tokenize" -H "$json" -d "{\"messages\": $question}"; echo
