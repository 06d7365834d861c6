"""A safe unpickler: builds numbers, text, lists, tuples, dicts and tensor references only.

It is a stack machine of its own. Python's, even with a restricted `find_class`, calls whatever is
on its stack, sets attributes of classes and functions, and allocates as much memory as the stream
asks for. Here only the functions of one table are called, and nothing is imported. A class that
real files carry beside their weights becomes a placeholder, a name without content; any other
global is refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from ldm.errors import FolderError
from ldm.files.tensors.pickled import Function, Placeholder, StorageRef, StorageType, find, put

LIMIT = 16 * 2**20  # bytes of a pickle; a full Stable Diffusion checkpoint with its optimizer has about 1 MiB
MOST_WORK = 2**25  # elements passed to calls in total: a list in the memo may be passed repeatedly


_OPERATIONS: dict[int, Callable[[Unpickler, int], None]] = {}
_REFUSED = {0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x69: "INST", 0x6F: "OBJ", 0x92: "NEWOBJ_EX", 0x50: "PERSID"}
_REFUSED |= {0x97: "NEXT_BUFFER"}
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False}
_CONTAINERS: dict[int, Callable[[], Any]] = {0x29: tuple, 0x5D: list, 0x7D: dict}
_CONTAINERS[0x8F] = lambda: Placeholder("builtins.set")
_NUMBER = {0x4B: "<B", 0x4D: "<H", 0x4A: "<i", 0x47: ">d"}
_LENGTH = {0x58: "<I", 0x8C: "<B", 0x55: "<B", 0x54: "<I", 0x43: "<B", 0x42: "<I", 0x96: "<Q"}
# The last two are Python 2's strings; the other codes of _LENGTH are bytes.
_ENCODING = {0x58: "utf-8", 0x8C: "utf-8", 0x55: "latin1", 0x54: "latin1"}


def _on(*codes: int) -> Callable[[Callable[[Unpickler, int], None]], Callable[[Unpickler, int], None]]:
    def register(operation: Callable[[Unpickler, int], None]) -> Callable[[Unpickler, int], None]:
        _OPERATIONS.update(dict.fromkeys(codes, operation))
        return operation

    return register


class Unpickler:
    """Reads the pickles in ``data``, from ``position`` on; ``where`` names the file."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.position = data, where, 0
        self.storages: dict[str, StorageRef] = {}  # by key: each as first declared
        self._work = 0

    def load(self) -> Any:
        """Read the next value. Raises FolderError for a refused operation or a damaged pickle."""
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}
        try:
            while self.position < len(self.data):
                code = self.data[self.position]
                self.position += 1
                if code == 0x2E:
                    return self._stack.pop()
                if code not in _OPERATIONS:
                    self._refuse(f"operation {_REFUSED.get(code, hex(code))}")
                _OPERATIONS[code](self, code)
        except (IndexError, KeyError):  # an empty stack, or missing in the memo
            raise FolderError(f"{self.where}: its pickle is damaged at byte {self.position}") from None
        except (ValueError, TypeError, struct.error) as error:  # TypeError: too few arguments of a call
            raise FolderError(f"{self.where}: its pickle is damaged at byte {self.position}: {error}") from None

        self._cut_off()

    def _cut_off(self) -> NoReturn:
        raise FolderError(f"{self.where}: its pickle is cut off or longer than {LIMIT >> 20} MiB")

    def _take(self, count: int) -> bytes:
        if self.position + count > len(self.data):
            self._cut_off()
        self.position += count
        return self.data[self.position - count : self.position]

    def _refuse(self, what: str) -> NoReturn:
        raise FolderError(f"{self.where} asks for {what}, which weights never need: not opened")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    @_on(*_CONSTANTS)
    def _constant(self, code: int) -> None:
        self._stack.append(_CONSTANTS[code])

    @_on(*_CONTAINERS)
    def _empty(self, code: int) -> None:
        self._stack.append(_CONTAINERS[code]())

    @_on(*_NUMBER)
    def _number(self, code: int) -> None:
        self._stack += struct.unpack(_NUMBER[code], self._take(struct.calcsize(_NUMBER[code])))

    @_on(0x8A)
    def _long(self, code: int) -> None:
        self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    @_on(*_LENGTH)
    def _text(self, code: int) -> None:
        (length,) = struct.unpack(_LENGTH[code], self._take(struct.calcsize(_LENGTH[code])))
        data = self._take(length)
        self._stack.append(data.decode(_ENCODING[code]) if code in _ENCODING else data)

    @_on(0x28)
    def _mark(self, code: int) -> None:
        self._outer.append(self._stack)
        self._stack = []

    @_on(0x30, 0x31)
    def _pop(self, code: int) -> None:
        if code == 0x31:
            self._since_mark()
        else:
            self._stack.pop()

    @_on(0x74, 0x85, 0x86, 0x87)
    def _tuple(self, code: int) -> None:
        if code == 0x74:
            items = self._since_mark()
        else:
            count = code - 0x84
            items, self._stack[-count:] = [self._stack[i] for i in range(-count, 0)], []
        self._stack.append(tuple(items))

    @_on(0x71, 0x72, 0x94)
    def _remember(self, code: int) -> None:
        self._memo[len(self._memo) if code == 0x94 else self._index(code == 0x71)] = self._stack[-1]

    @_on(0x68, 0x6A)
    def _recall(self, code: int) -> None:
        self._stack.append(self._memo[self._index(code == 0x68)])

    def _index(self, short: bool) -> int:
        return int.from_bytes(self._take(1 if short else 4), "little")

    @_on(0x61, 0x65, 0x90)
    def _append(self, code: int) -> None:
        items = [self._stack.pop()] if code == 0x61 else self._since_mark()
        target = self._stack[-1]
        if isinstance(target, list) and code != 0x90:
            target += items
        elif not isinstance(target, Placeholder):
            self._refuse(f"an element added to a {type(target).__name__}")

    @_on(0x73, 0x75)
    def _set(self, code: int) -> None:
        items = [self._stack.pop(), self._stack.pop()][::-1] if code == 0x73 else self._since_mark()
        target = self._stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                put(target, key, value)
        elif not isinstance(target, Placeholder):
            self._refuse(f"an entry set in a {type(target).__name__}")

    @_on(0x91)
    def _frozen(self, code: int) -> None:
        self._since_mark()
        self._stack.append(Placeholder("builtins.frozenset"))

    @_on(0x63, 0x93)
    def _global(self, code: int) -> None:
        if code == 0x63:
            start, self.position = self.position, self.data.index(b"\n", self.data.index(b"\n", self.position) + 1) + 1
            module, name = self.data[start : self.position - 1].decode().split("\n")
        else:
            name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            self._refuse(f"a global whose name is a {type(name).__name__}")
        try:
            self._stack.append(find(module, name))
        except LookupError as error:
            self._refuse(repr(str(error.args[0])[:200])[1:-1])

    @_on(0x52, 0x81)
    def _call(self, code: int) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        if isinstance(what, Placeholder):
            self._stack.append(Placeholder(what.name))
        elif not isinstance(what, Function) or code == 0x81 or type(arguments) is not tuple:
            self._refuse(f"a call of a {type(what).__name__}")
        else:
            inside = (len(a) for a in arguments if isinstance(a, (str, bytes, list, tuple, dict)))
            self._work += len(arguments) + sum(inside)
            if self._work > MOST_WORK:
                self._refuse("more work than any weights take")
            self._stack.append(what.call(*arguments))

    @_on(0x62)
    def _state(self, code: int) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, np.dtype):
            if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|")):
                self._refuse("numpy numbers of another byte order")
        elif not isinstance(target, (Placeholder, dict)):  # the attributes of an OrderedDict of weights are ignored
            self._refuse(f"a state set in a {type(target).__name__}")

    @_on(0x51)
    def _storage(self, code: int) -> None:
        known = self._stack.pop()
        if type(known) is not tuple or len(known) not in (5, 6) or known[0] != "storage":
            self._refuse("a persistent object that is not a storage")
        _, kind, key, _, count = known[:5]
        if not isinstance(kind, StorageType):
            self._refuse("a persistent object that is not a storage")
        if type(key) is not str or type(count) is not int or count < 0 or (len(known) == 6 and known[5] is not None):
            self._refuse("a storage without key and size, or a view of another")
        storage = StorageRef(key, kind.dtype, count)
        self.storages.setdefault(key, storage)
        self._stack.append(storage)

    @_on(0x80, 0x95)
    def _skip(self, code: int) -> None:
        self._take(1 if code == 0x80 else 8)  # the protocol, the length of a frame
