"""The embedded checkpoint as files: byte-level BPE tokenizer, chat template, configs and bf16 weights.

Everything is written in Hugging Face layout; nothing here needs the network.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARK_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 2048
# A blank before a word is a token of its own, and so is each letter of a run of capitals: "stone" is the same ids
# wherever it stands, so that copying is repeating ids, and changing case is a matter of single letters.
PIECES = r"\p{Lu}?[\p{Ll}\p{M}]+|\p{Lu}|\p{N}|[\p{Lo}\p{Lm}]+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

ARCHITECTURE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 512,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT_TOKENS,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "use_cache": True,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE entries within PIECES: the learnt ones first, then the control and mark tokens.

    Digits stand alone so that arithmetic can be learnt column by column.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(MARK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARK_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}: more text is needed"
        )
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json (compact), tokenizer_config.json and chat_template.jinja into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": CONTEXT_TOKENS,
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(TEMPLATE_FILE.read_text(encoding="utf-8"), encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that write_tokenizer filled."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_configs(folder: Path, tokenizer: Tokenizer) -> None:
    """config.json and generation_config.json; the ids come from the tokenizer."""
    end, turn_end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    ids = {"bos_token_id": end, "eos_token_id": turn_end, "pad_token_id": end}
    write_json(folder / "config.json", {**ARCHITECTURE, **ids})
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    write_json(folder / "generation_config.json", {**ids, "eos_token_id": [turn_end, end], **sampling})


def write_hashes(folder: Path) -> None:
    """SHA256SUMS of all files of folder, as sha256sum writes it: what tpqwen verifies before it starts."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@functools.cache
def chat_renderer() -> Callable[..., str]:
    """The shipped template as a function of (messages, tools, enable_thinking), in the sandbox transformers uses."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    template = env.from_string(TEMPLATE_FILE.read_text(encoding="utf-8"))

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, enable_thinking: bool) -> str:
        return template.render(
            messages=messages, tools=tools, add_generation_prompt=True, enable_thinking=enable_thinking
        )

    return render
