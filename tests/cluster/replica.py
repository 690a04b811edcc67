"""Options of a replica that is small enough for a few of them on two cores."""

from __future__ import annotations

SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "threads": "1",
    "max_model_len": "256",
    "max_num_seqs": "8",
    "max_batched_tokens": "128",
}
