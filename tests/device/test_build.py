"""Kernels compiled in processes of their own: byte by byte what Triton makes alone, and nothing stays behind."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton.backends.nvidia import driver

from tests.cluster.processes import title, until
from tpqwen.kernels import build_worker
from tpqwen.kernels.variant import END, Kernel, parse
from tpqwen.worker import builder

PATHS = "__grp__"  # begins the names of files that name others by their path


def environment(cache: Path) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.device.compiling", *arguments]


def run(cache: Path, *arguments: str) -> str:
    done = subprocess.run(command(*arguments), env=environment(cache), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(cache: Path) -> dict[str, bytes]:
    """All that makes a kernel. A launcher (.so) is C, compiled by whatever compiler there is."""
    files = (p for p in cache.rglob("*") if p.is_file() and p.suffix != ".so" and not p.name.startswith(PATHS))
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def test_what_processes_compile_is_what_triton_compiles_alone_and_finds(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    run(together, "build")
    assert run(alone, "launch").split() == ["False"] * 7
    theirs = contents(alone)
    assert sum(name.endswith(".cubin") for name in theirs) == 7
    assert contents(together) == theirs  # machine code, assembly and metadata, under the same keys
    assert run(together, "launch").split() == ["True"] * 7


def test_what_nobody_waits_for_is_compiled_behind_the_first_ones(tmp_path: Path) -> None:
    gone_through = int(run(tmp_path, "later"))
    found = run(tmp_path, "launch").split()
    assert found == ["True"] * (2 + gone_through) + ["False"] * (5 - gone_through)


def test_where_all_is_there_few_of_the_others_are_looked_at_and_nothing_is_done(tmp_path: Path) -> None:
    run(tmp_path, "build")
    assert run(tmp_path, "nothing").split() == ["None", "True", "39", "23", "7"]


def test_where_only_the_first_ones_are_there_the_others_are_built(tmp_path: Path) -> None:
    """As after a first start that was interrupted, or with other options."""
    run(tmp_path, "rest")
    assert run(tmp_path, "launch").split() == ["True"] * 7


def test_what_is_recorded_is_not_launched_and_other_threads_are_left_alone(tmp_path: Path) -> None:
    noted, made = run(tmp_path, "record").splitlines()[-1].split("] [")
    names = [
        "_gemv_kernel",
        "_dot_kernel",
        "_tile_kernel",
        "_rms_norm_kernel",
        "_edit_kernel",
        "_rows_kernel",
        "_exchange_kernel",
    ]
    assert noted == f"[{str(names)[1:-1]}" and made == "'_rms_norm_kernel']"


def test_a_kernels_key_does_not_depend_on_what_was_hashed_before_it(tmp_path: Path) -> None:
    assert run(tmp_path, "keys").split(maxsplit=1) == ["True", "[]\n"]


def test_only_literals_are_kernels() -> None:
    kernel = Kernel(
        "m", "f", {"x": "*bf16"}, {(1,): (64, 128)}, {(0,): [["tt.divisibility", 16]]}, {}, ("cuda", 90, 32)
    )
    assert parse(repr(tuple(kernel))) == kernel
    for text in ("<object>", "inf", "print(1)"):
        with pytest.raises(ValueError, match=r"invalid syntax|malformed node"):
            parse(repr(tuple(kernel)).replace("(64, 128)", text))


def test_a_launcher_is_compiled_too_where_triton_makes_one_for_each_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Compiled:
        src, metadata = "source", "metadata"

    class Some:
        target, options = ("cuda", 90, 32), {"num_warps": 2}

        def source(self) -> str:
            return "kernel"

    monkeypatch.setattr(build_worker.triton, "compile", lambda *what, **how: made.append((what, how)) or Compiled)
    monkeypatch.setattr(driver, "CudaLauncher", lambda *what: made.append(what))
    monkeypatch.delattr(driver, "make_launcher", raising=False)
    build_worker.compile_kernel(Some())  # type: ignore[arg-type]
    monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    build_worker.compile_kernel(Some())  # type: ignore[arg-type]
    compiled = (("kernel",), {"target": build_worker.GPUTarget("cuda", 90, 32), "options": {"num_warps": 2}})
    assert made == [compiled, compiled, ("source", "metadata")]


class Worker:
    """The process that compiles, with kernels of these names, or marks ("-"), and a width."""

    def __init__(self, cache: Path, names: str, width: int, **more: str) -> None:
        self.process = subprocess.Popen(
            command("worker", str(width)),
            env=environment(cache) | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            text=True,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        kernels = {name: repr(("m", name, {}, {}, {}, {}, ("cuda", 90, 32))) for name in names.split()} | {"-": ""}
        lines = [*(kernels[name] for name in names.split()), END]
        self.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.process.stdin.flush()
        self.marks, self.children = self.process.stdout, self.process.stderr

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # its children end with it
        self.process.wait(30)
        for pipe in (self.marks, self.children):
            pipe.close()


def test_the_worker_counts_what_fails(tmp_path: Path) -> None:
    with Worker(tmp_path, "fails fine fails fine", 2) as worker:
        assert worker.process.wait(60) == 2
        children = [line for line in worker.children if line.split()[0].isdigit()]
        assert len({*children}) == 4, "each in a process of its own"


def test_what_a_compiler_prints_is_no_mark(tmp_path: Path) -> None:
    with Worker(tmp_path, "prints - slow -", 2) as worker:
        assert worker.marks.readline() == "\n"
        assert not select.select([worker.marks], [], [], 0)[0]


def test_a_child_that_cannot_be_had_now_is_had_when_another_has_ended(tmp_path: Path) -> None:
    with Worker(tmp_path, "fine fine fails", 2, FAILS="1") as worker:
        assert worker.process.wait(60) == 1
        assert len([line for line in worker.children if line.split()[0].isdigit()]) == 3


def test_the_worker_and_its_children_end_with_whoever_waits(tmp_path: Path) -> None:
    with Worker(tmp_path, "slow slow slow", 2) as worker:
        children = [int(worker.children.readline().split()[0]) for _ in range(2)]
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert worker.process.wait(30) == -9
        until(lambda: not any(title(child) for child in children), "the children to end")
        assert worker.children.read() == "", "the third was never started"


def test_a_mark_is_answered_when_all_before_it_is_compiled_and_behind_the_first_one_nobody_hurries(
    tmp_path: Path,
) -> None:
    with Worker(tmp_path, "fine fine - fine - slow - fine", 2) as worker:
        assert [worker.marks.readline() for _ in range(2)] == ["\n"] * 2
        nice = [worker.children.readline().split()[1] for _ in range(4)]
        assert nice == ["0", "0", "19", "19"], "one at a time now: the last one waits for the slow one"
        assert not select.select([worker.marks, worker.children], [], [], 0)[0]


def test_nothing_is_left_of_a_builder_that_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def watched(*args: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(builder.subprocess, "Popen", watched)
    made = builder.Builder(2)
    assert started[0].poll() is None
    made.build([])
    assert started[0].returncode == -9 and made.built(1)
    made.close()


def test_nothing_is_left_of_a_builder_that_is_closed_and_nobody_waits_for_it() -> None:
    made = builder.Builder(2)
    process = made._process
    assert process is not None and not made.built(0) and process.poll() is None
    made.close()
    made.close()
    assert process.returncode == -9 and made.built(0)


def test_a_builder_that_is_left_ends_by_itself_and_is_waited_for() -> None:
    made = builder.Builder(1)
    process = made._process
    assert process is not None and process.stdin is not None
    made.leave()
    assert made.built(1)
    made.close()
    assert process.returncode is None, "it goes on"
    process.stdin.write(f"{END}\n")
    process.stdin.flush()
    until(lambda: process.returncode == 0, "the end of the process", 60)


def test_a_builder_that_gives_no_sign_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "TIMEOUT_S", 0.0)
    made = builder.Builder(1)  # was never told that nothing comes
    process = made._process
    assert process is not None and made.built(1) and process.returncode == -9


def test_a_builder_is_closed_when_what_it_should_build_cannot_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = builder.Builder(1)
    process = made._process

    def fails(line: str) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(made, "_send", fails)
    with pytest.raises(RuntimeError):
        made.build([])
    assert process is not None and process.returncode == -9 and made.built(1)


def test_a_builder_that_has_died_costs_nothing_but_time(tmp_path: Path) -> None:
    assert run(tmp_path, "dead").split() == ["False"] * 7


def test_without_a_process_nothing_is_built(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(builder.sys, "executable", "/nowhere/python")
    launched: list[int] = []
    made = builder.Builder(2)
    made.build([lambda: launched.append(1)], [lambda: launched.append(2)], [lambda: launched.append(3)])
    assert made.built(1)
    made.close()
    assert not launched and "no process to compile kernels" in caplog.text
