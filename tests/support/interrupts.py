"""Ends of a training that nothing catches."""

import threading


class PowerCut(BaseException):
    """An end that nothing catches, so that nothing is saved before it.

    It waits for the checkpoint being written, so that the files do not depend on the machine's speed.
    """

    def __init__(self) -> None:
        end_writes()


def end_writes() -> None:
    """Wait for checkpoints that are being written in the background."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
