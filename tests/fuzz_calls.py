"""Calls of commands and of the library in a process each, with limits on time, memory and file size."""

from __future__ import annotations

import faulthandler
import io
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fuzz_examples import Call

from ldm.cli import main as command_line

LIMIT = 15.0  # seconds of a processor for a call, which may have to wait for it four times as long
MEMORY = 3 << 30  # bytes of address space beyond those of the process that calls


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    code: int | None  # None: ended for its time; negative: by a signal
    stdout: str
    stderr: str
    left: tuple[str, ...] = ()  # files where there should be none after a refusal
    changed: tuple[str, ...] = ()  # files of the input that are not as they were

    @property
    def lines(self) -> list[str]:
        """What was said on stderr, without warnings."""
        return [line for line in self.stderr.splitlines() if line.strip() and not line.startswith("warning: ")]


def limited(call: Call, output: tuple[int, int]) -> None:
    """In the process that is there for one call: make it, and end with its exit code."""
    os.setsid()
    for descriptor, target in enumerate((os.open("/dev/null", os.O_RDONLY), *output)):
        os.dup2(target, descriptor)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), call.encoding, write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), call.encoding, "backslashreplace", write_through=True)
    faulthandler.register(signal.SIGUSR2)
    signal.alarm(int(8 * LIMIT))  # where nobody is left to end it
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.dont_write_bytecode = True  # a full disk would leave half of it
    if call.disk is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call.disk, call.disk))
    code = 1
    try:
        code = answer(call)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def answer(call: Call) -> int:
    """The exit code of a command; of a call of the library that of its error, or 0 and its pictures under out/."""
    try:
        if call.python is None:
            return command_line.main(call.argv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pictures = call.python()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        print(f"ldm python: {error}", file=sys.stderr)
        return code
    Path("out").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(f"out/{i}.png")
    return 0


def carried_out(call: Call) -> Outcome:
    """Make a call in the current folder, in a process of its own, and end it when its time is over."""
    before, pipes = stamps(), (os.pipe(), os.pipe())
    pid = os.fork()
    if pid == 0:
        limited(call, (pipes[0][1], pipes[1][1]))
    said = [Said(*pipe) for pipe in pipes]
    limit, status = time.monotonic() + 4 * LIMIT, None
    while status is None and time.monotonic() < limit and spent(pid) < LIMIT:
        done, found = os.waitpid(pid, os.WNOHANG)
        status = found if done else None
        for one in said:
            one.read()
        time.sleep(0.005)
    if status is None:
        os.kill(pid, signal.SIGUSR2)  # says where it is
        time.sleep(0.2)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its data workers as well
    code = os.waitstatus_to_exitcode(status) if status is not None else os.waitpid(pid, 0) and None
    stdout, stderr = (one.end() for one in said)
    after = stamps()
    left = tuple(name for name in after if any(Path(name).is_relative_to(place) for place in call.out))
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    changed = [n for n in differing if not n.startswith("out") and (n in before or not asked_for(n, call, before))]
    return Outcome(code, stdout, stderr, left, tuple(changed))


def asked_for(name: str, call: Call, before: Collection[str]) -> bool:
    """True for a new file that the call names, or below a folder that it names and that held nothing before."""
    free = [word for word in call.argv if not any(Path(old).is_relative_to(word) for old in before)]
    return any(Path(name).is_relative_to(word) for word in free)


def spent(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    user, system = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Said:
    """What comes out of a pipe."""

    def __init__(self, reader: int, writer: int) -> None:
        os.close(writer)
        os.set_blocking(reader, False)
        self.reader, self.content = reader, b""

    def read(self) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self.reader, 1 << 16):
                self.content += part

    def end(self) -> str:
        self.read()
        os.close(self.reader)
        return self.content.decode("utf-8", "replace")


def stamps() -> dict[str, tuple[int, int]]:
    """Size and time of each file below the current folder."""
    found = {}
    for folder, _, names in os.walk("."):
        for path in (os.path.normpath(os.path.join(folder, name)) for name in names if name != ".lock"):
            about = os.lstat(path)
            found[path] = about.st_size, about.st_mtime_ns
    return found
