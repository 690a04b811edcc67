"""What the HTTP side and the engine loop say to each other. msgpack, one message per step towards the HTTP side."""

from __future__ import annotations

import msgspec

from tpqwen.request import Delta, GenerateRequest
from tpqwen.step import StepStats


class Add(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Queue a request."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """End a request; unknown ids are ignored."""

    id: str


class RanksLost(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The owner of the ranks has seen one die."""

    reason: str
    rank: int | None = None


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """End the loop. What is still running ends with it."""


class Batch(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """All that one step brought."""

    deltas: list[Delta]
    stats: StepStats | None = None


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """A request that the scheduler will never run; no delta follows."""

    id: str
    message: str
    param: str | None
    code: str | None


class Dead(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """The engine cannot go on; every open request has been told."""

    reason: str
    code: str


Command = Add | Abort | RanksLost | Stop
Report = Batch | Refused | Dead

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
