"""A small byte-level tokenizer with Qwen3's control tokens and a chat template of Qwen3's forms, built at test time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tpqwen.text.tokenizer import Tokenizer as OurTokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>")
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_WORDS = (
    "the quick brown fox jumps over the lazy dog. Hello world, how are you? I am well; thank you! "
    "user assistant system "
    "日本語の文字 한국어 文字 naïve café Ünïcödé 👩‍👩‍👧‍👦 🇩🇪 "
    "tool response think 12345 stop END of line\n\nnew paragraph\n"
    "yes\nyes\nyes\nno\nno\nno\n"
)
_SPLIT = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+"""
)

GENERATION_PROMPTS = {
    "hybrid": (
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}"
    ),
    "thinking": "{{- '<think>\\n' }}",
    "non-thinking": "{{- '<think>\\n\\n</think>\\n\\n' }}",
    "instruct": "",
    "coder": "",
}
CALL_FORMS = {
    "json": (
        '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
        "{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
        "{{- '}\\n</tool_call>' }}"
    ),
    "xml": (
        "{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}"
        "{%- for key, value in call.function.arguments | items %}"
        "{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}"
        "{%- endfor %}"
        "{{- '</function>\\n</tool_call>' }}"
    ),
}
_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- set wraps = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if message.role == 'user' and not wraps %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first and tools %}
    {%- elif message.role == 'user' or message.role == 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set ns.text = message.content %}
        {%- set ns.reasoning = message.reasoning_content or '' %}
        {%- if not ns.reasoning and '</think>' in ns.text %}
            {%- set ns.reasoning = ns.text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set ns.text = ns.text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or ns.reasoning) %}
            {{- '<think>\\n' + ns.reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- ns.text }}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or ns.text %}{{- '\\n' }}{%- endif %}
            CALL
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}GENERATION{%- endif %}
"""


def write_tokenizer(folder: Path, variant: str = "hybrid") -> Path:
    """tokenizer.json and tokenizer_config.json as in a Qwen3 checkpoint, with a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_WORDS], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in MARKS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if variant != "base":
        template = _TEMPLATE.replace("GENERATION", GENERATION_PROMPTS[variant])
        config["chat_template"] = template.replace("CALL", CALL_FORMS["xml" if variant == "coder" else "json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def tokenizer(variant: str = "hybrid") -> OurTokenizer:
    """The fixture loaded through the ordinary path; one per test run."""
    return OurTokenizer(write_tokenizer(Path(mkdtemp(prefix="tpqwen-tokenizer-")), variant))
