"""What the HTTP side and the engine loop say to each other. msgpack, one message per step towards the HTTP side."""

from __future__ import annotations

from typing import Any

import msgspec

from tpqwen.request import Deltas, GenerateRequest
from tpqwen.step import Capacity, Snapshot, StepStats


class Add(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Queue a request."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """End a request; unknown ids are ignored."""

    id: str


class RanksLost(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The owner of the ranks has seen one of this epoch die."""

    reason: str
    rank: int
    epoch: int


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """End the loop. What is still running ends with it."""


class Resume(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The ranks are back as a new group: attach to them, go on with all requests, and say Resumed once tokens come.

    An engine that was started over that group has attached already. answers: where each rank's outputs are.
    """

    epoch: int
    capacity: Capacity
    answers: list[dict[str, Any] | None]


class Look(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Say once, between two steps, what the scheduler holds."""


class Drain(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Nobody else will come, until that is over. What is here goes on."""

    over: bool = False


class Several(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """What came together, in this order: the engine wakes up once for it and sees all of it before its next step."""

    commands: list[Command]


class Batch(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """All that one step brought."""

    deltas: Deltas
    stats: StepStats | None = None


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """A request that the scheduler will never run; no delta follows."""

    id: str
    message: str
    param: str | None
    code: str | None


class Dead(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """The engine cannot go on. Unless somebody replaces it, it has told every open request."""

    reason: str
    code: str


class Lost(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """The ranks of this epoch cannot go on; every request is kept and waits for Resume.

    ranks: those to be replaced, none when it is not known. silent_s: seconds since they were last known to work.
    """

    epoch: int
    reason: str
    code: str
    ranks: list[int]
    silent_s: float


class Resumed(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """The new group has brought its first results, or there was nothing to run. replay_s: seconds since Resume."""

    epoch: int
    replay_s: float


class Seen(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """The answer to Look."""

    snapshot: Snapshot


class Started(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """From now on these requests are being computed: if the engine dies, they may be why. Said before it happens."""

    ids: list[str]


Command = Add | Abort | RanksLost | Stop | Resume | Look | Drain | Several
Report = Batch | Refused | Dead | Lost | Resumed | Seen | Started

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def each(command: Command) -> list[Command]:
    """The commands of one message."""
    return command.commands if isinstance(command, Several) else [command]


def together(commands: list[bytes]) -> bytes:
    """One message of encoded commands."""
    return commands[0] if len(commands) == 1 else encode(Several([msgspec.Raw(c) for c in commands]))  # type: ignore[misc]
