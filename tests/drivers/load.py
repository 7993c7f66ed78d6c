"""What the drivers in Python share: workers, what they found, and how it is told.

argv ends in: connection string, number of busy workers. Each worker has a session of its own (or takes one from a
pool) and works in rounds until standard input ends, then one round more. One worker beyond the busy ones is idle: it
has a first round, one when a line comes on standard input, and a last one after all others. The line says that clients
are held: what the worker asks for then, it gives up again, as clients do that are out of patience. A session beside
them listens, and holds an advisory lock: it is to hear what worker 0 notifies, all of it, once and in order.

At the end one JSON object is printed: version, acknowledged ids, errors, and what was wrong. The first error ends
everything: it is one that the application would have seen.
"""
import asyncio
import json
import os
import sys
import threading
from contextlib import contextmanager
from itertools import count

PAUSE = 0.2
# A client's patience while it is held.
PATIENCE = 0.3


class Ids:
    """Makes the ids of a round from numbers."""

    def __init__(self, prefix: str, held: bool) -> None:
        self.prefix, self.held = prefix, held

    def __call__(self, k: int) -> str:
        return f"{self.prefix}/{k}"


class Load:
    def __init__(self, name: str, version: str) -> None:
        self.name, self.version = name, version
        self.url, self.busy = sys.argv[-2], int(sys.argv[-1])
        self.acknowledged, self.errors, self.wrong, self.notified, self.heard = [], [], [], [], []
        self.held, self.stop, self.alone = threading.Event(), threading.Event(), threading.Event()
        self.listen = f"""listen "{name}"; select pg_advisory_lock(20000, hashtext('{name}'))"""

    def rounds(self, number: int):
        for i in count(1):
            # Before the round: what is over by now is in it.
            last = self.alone.is_set() if number == self.busy else self.stop.is_set()
            held = number == self.busy and i == 2
            if not held or not self.stop.is_set():
                yield Ids(f"{self.name}/{number}/{i}", held)
            if last:
                return
            if number != self.busy:
                self.stop.wait(PAUSE)
            elif held:
                print("gave up", flush=True)
                self.alone.wait()
            else:
                self.held.wait()

    async def rounds_async(self, number: int):
        rounds = self.rounds(number)
        while (ids := await asyncio.to_thread(next, rounds, None)) is not None:
            yield ids

    def acknowledge(self, *ids: str) -> None:
        self.acknowledged.extend(ids)

    def expect(self, what: str, found, expected) -> None:
        """The same value of the same type, inside as well."""
        if not same(found, expected):
            self.wrong.append(f"{what}: {found!r} of {type(found)}, not {expected!r} of {type(expected)}")

    def failed(self, error: BaseException) -> None:
        self.errors.append(f"{type(error).__name__}: {error}")
        self.end()

    def end(self) -> None:
        self.stop.set()
        self.held.set()

    def start(self) -> None:
        """Follows standard input."""

        def follow() -> None:
            while os.read(0, 1):
                self.held.set()
            self.end()

        threading.Thread(target=follow, daemon=True).start()

    def run(self, work, last=None) -> None:
        """Runs work(number) in threads, and last() when only the listener is left."""

        def one(number: int) -> None:
            try:
                work(number)
            except BaseException as error:
                self.failed(error)

        self.start()
        *busy, idle = [threading.Thread(target=one, args=(n,)) for n in range(self.busy + 1)]
        for worker in (*busy, idle):
            worker.start()
        for worker in busy:
            worker.join()
        self.alone.set()
        idle.join()
        if last:
            last()
        self.tell()

    def tell(self) -> None:
        self.expect("notifications", self.heard, self.notified)
        print(json.dumps({"version": self.version, "acknowledged": self.acknowledged, "errors": self.errors,
                          "wrong": self.wrong[:5]}), flush=True)


@contextmanager
def impatient(cancel):
    """Cancels what is waited for inside: again and again, as a cancel that comes too early is for nothing."""

    def repeat() -> None:
        while not over.wait(PATIENCE):
            cancel()

    over = threading.Event()
    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b
