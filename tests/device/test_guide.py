"""The states of a guided sequence: which ids each allows, and that giving the tokens again leads to the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tpqwen.parallel.group import TPGroup
from tpqwen.request import Guide
from tpqwen.step import Admit, RowParams, packed
from tpqwen.worker.guide import GuideState, Masks, Phase
from tpqwen.worker.guides import GuideRows

SIZE = 70
END, STOP, THINK, THOUGHT, OPEN, CLOSE, BLANK, NEWLINE = 60, 61, 62, 63, 64, 65, 66, 67
IDS = {"think_open": THINK, "think_close": THOUGHT, "call_open": OPEN, "call_close": CLOSE, "newline_id": NEWLINE}
ANSWER, CALL = bytes([1, 2]), bytes([5, 6])
EVERYTHING = set(range(96))


@dataclass
class FakeMatcher:
    """A grammar of one text: the ids in `left`, then a stop id."""

    left: list[int]
    stops: tuple[int, ...]

    def take(self, token_id: int) -> bool:
        if not self.left or token_id != self.left[0]:
            return not self.left and token_id in self.stops
        self.left.pop(0)
        return True

    def fill(self, masks: Masks, row: int) -> None:
        for i in self.left[:1] or self.stops:
            masks[row].view(np.uint32)[i // 32] |= np.uint32(1 << (i % 32))


class FakeGrammars:
    def matcher(self, compiled: bytes, stop_ids: tuple[int, ...]) -> FakeMatcher:
        return FakeMatcher(list(compiled), stop_ids)


def allowed(state: GuideState) -> set[int]:
    masks = np.full((2, 3), 7, np.int32)
    state.fill(masks, 1)
    assert (masks[0] == 7).all()
    return set(np.flatnonzero(np.unpackbits(masks[1].view(np.uint8), bitorder="little")).tolist())


def follow(tokens: list[int], **fields: Any) -> list[set[int]]:
    """What is allowed before each token and after the last; each token given is allowed where it comes."""
    guide = Guide(**{"end_ids": (END,), "forbidden_ids": (END, STOP), "blank_ids": (BLANK,), **IDS, **fields})
    state, seen = GuideState(guide, FakeGrammars()), []
    for i in range(len(tokens) + 1):
        again = GuideState(guide, FakeGrammars(), tokens[:i])
        seen.append(allowed(state))
        assert (again.phase, allowed(again)) == (state.phase, seen[-1])
        if i < len(tokens):
            assert tokens[i] in seen[-1]
            state.take(tokens[i])
            assert state.phase is not Phase.BROKEN
    return seen


def test_an_answer_alone() -> None:
    assert follow([1, 2, END], answer=ANSWER) == [{1}, {2}, {END}, EVERYTHING]


def test_thinking_is_free_but_must_not_end_the_output() -> None:
    seen = follow([THINK, 9, THOUGHT, BLANK, 1, 2], answer=ANSWER, may_think=True)
    assert seen == [{1, THINK}, EVERYTHING - {END}, EVERYTHING - {END}, {1, BLANK}, {1}, {2}, {END}]
    assert follow([9, THOUGHT, 1], answer=ANSWER, inside=True)[1:] == [EVERYTHING - {END}, {1, BLANK}, {2}]
    assert follow([1], answer=ANSWER, may_think=True)[1] == {2}


def test_calls_on_demand() -> None:
    body = {"call": CALL, "calls": 1}
    seen = follow([OPEN, 5, 6, CLOSE, NEWLINE, OPEN, 5, 6, CLOSE, OPEN, 5, 6, CLOSE, END], **body)
    more = {END, NEWLINE, OPEN}
    assert seen[:6] == [{OPEN}, {5}, {6}, {CLOSE}, more, {OPEN}]
    assert (seen[9], seen[13], seen[14]) == (more, more, EVERYTHING)
    assert follow([OPEN, 5, 6, CLOSE], parallel=False, **body)[-1] == {END}
    assert follow([THINK, THOUGHT, BLANK, OPEN], may_think=True, **body)[2:4] == [{OPEN, BLANK}, {OPEN}]


def test_calls_at_will() -> None:
    seen = follow([9, OPEN, 5, 6, CLOSE, 9, OPEN, 5], call=CALL, calls=0)
    assert seen == [EVERYTHING, EVERYTHING, {5}, {6}, {CLOSE}, EVERYTHING, EVERYTHING, {5}, {6}]
    assert follow([9, OPEN, 9, CLOSE, 9], calls=0)[2] == EVERYTHING
    assert follow([OPEN, 5], call=CALL, calls=0)[1] == {5}


def test_an_answer_or_calls() -> None:
    fields = {"answer": ANSWER, "call": CALL, "calls": 0}
    assert follow([1, 2], **fields) == [{1, OPEN}, {2}, {END}]
    assert follow([OPEN, 5, 6, CLOSE], **fields) == [{1, OPEN}, {5}, {6}, {CLOSE}, {END, NEWLINE, OPEN}]
    free_body = follow([OPEN, 9, CLOSE, END], answer=ANSWER, calls=0)
    assert free_body == [{1, OPEN}, EVERYTHING, EVERYTHING, {END, NEWLINE, OPEN}, EVERYTHING]


def test_min_tokens_forbid_ends_while_anything_else_may_come() -> None:
    seen = follow([9, OPEN, 5, 6, CLOSE, 9, 9], call=CALL, calls=0, min_tokens=6)
    assert [EVERYTHING - s for s in (seen[0], seen[5], seen[6])] == [{END, STOP}, {END, STOP}, set()]
    assert follow([1, 2, END], answer=ANSWER, min_tokens=9)[2] == {END}


def test_a_token_that_was_not_allowed_leaves_nothing() -> None:
    for tokens, fields in (
        ([1, 1], {"answer": ANSWER}),
        ([9], {"calls": 1, "call": CALL}),
        ([OPEN, 9], {"calls": 1, "call": CALL}),
    ):
        guide = Guide(end_ids=(END,), **IDS, **fields)
        state = GuideState(guide, FakeGrammars(), tokens)
        assert state.phase is Phase.BROKEN
        assert allowed(state) == set()


def test_the_last_steps_tokens_are_waited_for_only_when_masks_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the next forward pass can be launched, and a step without guided rows waits for nothing."""
    waits = []
    done = type("Done", (), {"query": lambda self: waits.append(1) or True})()
    rows = GuideRows(None, SIZE, 0, SIZE, torch.device("cpu"), TPGroup.single())  # type: ignore[arg-type]
    monkeypatch.setattr(rows, "read", lambda: type("Read", (), {"result": staticmethod(FakeGrammars)}))
    plain, params = (RowParams(0.0, 0, 1.0, 0.0, 0, 0, guided=g) for g in (False, True))
    rows.admit(Admit(0, params, 0, 1, b"", Guide(answer=ANSWER, end_ids=(END,)), b""))
    rows.admit(Admit(1, plain, 0, 1))
    logits, tokens = torch.zeros(2, SIZE), torch.tensor([1, 0], dtype=torch.int32)
    for step in range(3):
        rows.select([0, 1])
        assert len(waits) == max(step - 1, 0)
        rows.apply(logits)
        assert len(waits) == step
        rows.sampled(tokens, done)
        tokens = torch.tensor([2 if step == 0 else END, 0], dtype=torch.int32)
    rows.select([1])
    assert rows.apply(logits[:1]) is not None
    rows.sampled(tokens[1:], done)
    assert len(waits) == 2


def test_tokens_of_a_step_that_was_aborted_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    group = TPGroup.single()
    rows = GuideRows(None, SIZE, 0, SIZE, torch.device("cpu"), group)  # type: ignore[arg-type]
    monkeypatch.setattr(rows, "read", lambda: type("Read", (), {"result": staticmethod(FakeGrammars)}))
    guide, params = Guide(answer=ANSWER, end_ids=(END,)), RowParams(0.0, 0, 1.0, 0.0, 0, 0, guided=True)

    def released(self: object) -> bool:
        group.called_off = True
        return True

    rows.admit(Admit(0, params, 0, 1, b"", guide, b""))
    rows.select([0])
    rows.sampled(torch.tensor([9], dtype=torch.int32), type("Done", (), {"query": released})())
    with pytest.raises(ConnectionError):
        rows.apply(torch.zeros(1, SIZE))
    assert rows._states[0].phase is not Phase.BROKEN
    rows.forget()
    logits = torch.zeros(1, SIZE)
    rows.select([0])
    assert rows.apply(logits).eq(0).all(), "the slot is free"


@pytest.mark.parametrize(("first", "local"), [(0, 70), (0, 35), (35, 35), (30, 50)])
def test_rows_mask_their_part_of_the_vocabulary_and_catch_up(
    monkeypatch: pytest.MonkeyPatch, first: int, local: int
) -> None:
    rows = GuideRows(None, SIZE, first, local, torch.device("cpu"), TPGroup.single())  # type: ignore[arg-type]
    monkeypatch.setattr(rows, "read", lambda: type("Read", (), {"result": staticmethod(FakeGrammars)}))
    guide = Guide(answer=ANSWER, end_ids=(END,))
    params = RowParams(0.0, 0, 1.0, 0.0, 0, 0, guided=True)
    rows.admit(Admit(4, params, 0, 1, b"", guide, b""))
    rows.admit(Admit(7, params, 1, 1, b"", guide, packed([1])))
    rows.admit(Admit(2, RowParams(0.0, 0, 1.0, 0.0, 0, 0), 0, 1))

    def step(slots: list[int], tokens: list[int]) -> list[set[int]]:
        rows.select(slots)
        masked = rows.apply(torch.zeros(len(slots), local))
        rows.sampled(torch.tensor(tokens, dtype=torch.int32), None)
        return [set((torch.nonzero(row == 0)[:, 0] + first).tolist()) for row in masked]

    mine = set(range(first, first + local))
    assert step([2, 7, 4], [0, 2, 1]) == [mine, {2} & mine, {1} & mine]
    assert step([4], [2]) == [{2} & mine]
    assert step([7, 4], [END, END]) == [{END} & mine, {END} & mine]
    assert step([2], [0]) == [mine]
    rows.admit(Admit(4, RowParams(0.0, 0, 1.0, 0.0, 0, 0), 0, 1))
    assert step([4, 7], [0, 0]) == [mine, mine]
