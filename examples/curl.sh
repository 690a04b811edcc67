#!/bin/sh
# The API by hand: whole, streamed, and what a prompt looks like in tokens. Usage: sh examples/curl.sh [URL]
# OPENAI_API_KEY is sent where it is set; OPENAI_BASE_URL, which ends in /v1, stands in for the URL.
set -eu
base=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
url=${1:-${base%/v1*}}
json='content-type: application/json'
question='[{"role": "user", "content": "What is 17 + 25?"}]'
quiet='"chat_template_kwargs": {"enable_thinking": false}, "temperature": 0, "max_tokens": 100'

ask() { curl -sS --fail-with-body ${OPENAI_API_KEY:+-H "authorization: Bearer $OPENAI_API_KEY"} "$@"; }

ask "$url/v1/models"; echo
ask "$url/v1/chat/completions" -H "$json" -d "{\"messages\": $question, $quiet}"; echo
ask -N "$url/v1/chat/completions" -H "$json" -d "{\"messages\": $question, $quiet, \"stream\": true}"
ask "$url/tokenize" -H "$json" -d "{\"messages\": $question}"; echo
