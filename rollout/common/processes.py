"""The processes of a job: who am I, gather, sum, wait, stop early. One process needs neither accelerate nor torch.distributed.

A command calls `start()` first and `close()` last, and `end()` where that left a group; in between any room may ask `start()`
again (it is the same answer).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from steerl.rollout.common.errors import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among its job's."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> Processes:
    """Join the job's processes, as `accelerate launch` or `torchrun` started them. Any number of calls is one."""
    _end_with_launcher()
    cpu = not torch.cuda.is_available()
    if importlib.util.find_spec("accelerate") is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("WORLD_SIZE: more than one process needs accelerate; pip install accelerate")
        return Processes(0, 1, torch.device("cpu" if cpu else "cuda"))
    from accelerate import PartialState

    # By it ranks but the first would be left without weights: here each reads its own share (rollout/model/unread.py).
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # Before any Accelerator(): without `cpu` here a job of several CPU processes is silently a job of one.
    state = PartialState(cpu=cpu)
    return Processes(state.process_index, state.num_processes, state.device)


def _end_with_launcher() -> None:
    """Ask the kernel to end this process when its launcher is killed: orphans would go on writing beside a resumed job."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not (by_torchrun or "ACCELERATE_MIXED_PRECISION" in os.environ) or sys.platform != "linux":
        return
    set_parent_death_signal = 1
    # A process by itself saves first: accelerate's launcher leaves at once on Ctrl-C. Several would wait for each other.
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL if by_torchrun else signal.SIGTERM)
    # Killed before the kernel was asked: whoever took this process in is not the Python program that starts workers.
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if by_torchrun and not any(word in parent for word in (b"python", b"torchrun", b"accelerate")):
            raise UserError("the launcher of this process has gone; start the job again")


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier() -> None:
    if is_distributed():
        torch.distributed.barrier()


def gather_objects(items: list[Value]) -> list[Value]:
    """Every process's items, in the order of ranks, on every process. A process without items gives []."""
    if not is_distributed():
        return list(items)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def gather_to_main(items: list[Value]) -> list[Value]:
    """The same on the main process alone; [] on others."""
    if not is_distributed():
        return list(items)
    parts: list[Any] | None = [None] * torch.distributed.get_world_size() if start().is_main else None
    torch.distributed.gather_object(items, parts)
    return [item for part in parts or () for item in part]


def gather_rows(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """Every process's rows (the first dimension), in the order of ranks, on every process, in the CPU's memory. `counts`: how
    many each has, which all know; dtype and other sizes are the same everywhere."""
    tensor = tensor.contiguous()
    row = tensor.element_size() * math.prod(tensor.shape[1:])
    most = row * max(counts)
    if not is_distributed():
        return tensor.cpu()
    if not most:
        return tensor.cpu().new_empty((sum(counts), *tensor.shape[1:]))
    # As bytes: backends differ in the dtypes that they take. One buffer for all, of equal parts.
    sent = torch.zeros(most, dtype=torch.uint8, device=start().device)
    sent[: tensor.nbytes] = tensor.flatten().view(torch.uint8)
    received = sent.new_empty(most * len(counts))
    # Its name from torch 2.13 on, where the older one warns.
    getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)(received, sent)
    received = received.cpu()
    if min(counts) < max(counts):
        received = torch.cat([part[: row * count] for part, count in zip(received.split(most), counts, strict=True)])
    return received.view(tensor.dtype).view(-1, *tensor.shape[1:])


def sum_(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if is_distributed():
        torch.distributed.all_reduce(tensor)
    return tensor


def most(count: int) -> int:
    """The largest of all processes' counts."""
    if not is_distributed():
        return count
    largest = torch.tensor(count, device=start().device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def on_main(function: Callable[[], Value]) -> Value:
    """What the main process gets from `function`, on every process. Its UserError is raised everywhere, told once."""
    if not is_distributed():
        return function()
    outcome: list[Any] = [None, False]  # value, whether it failed
    problem: UserError | None = None
    if start().is_main:
        try:
            outcome = [function(), False]
        except UserError as error:
            problem, outcome = error, [None, True]
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1]:
        raise problem or UserError()  # no lines: the main process shows them
    value: Value = outcome[0]
    return value


def on_all(function: Callable[[], Value]) -> list[Value]:
    """What each process gets from `function`, in the order of ranks, on every process. A UserError of any is raised on all, and
    told by the main one."""
    if not is_distributed():
        return [function()]
    own: list[Any] = []
    problem: UserError | None = None
    try:
        own = [function()]
    except UserError as error:
        problem = error
    found = gather_objects([(own, () if problem is None else problem.lines)])
    if lines := list(dict.fromkeys(line for _, lines in found for line in lines)):
        raise UserError(*(lines if start().is_main else ())) from problem
    return [value for (value,), _ in found]


SAME_PRESS = 1.0
"""Seconds in which a second Ctrl-C counts as the first: a terminal sends one to every process, and launchers pass on theirs."""


class Stop:
    """Whether SIGTERM or Ctrl-C asked this job to end early."""

    def __init__(self) -> None:
        self.since: float | None = None

    def here(self) -> bool:
        """This process was asked."""
        return self.since is not None

    def anywhere(self) -> bool:
        """Any process was: one answer for all. Collective."""
        if not is_distributed():  # and no waiting for a GPU
            return self.here()
        return bool(sum_(torch.tensor([int(self.here())], device=start().device)).item())


_stop: Stop | None = None
"""Of the block that is running."""


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """While the block runs, SIGTERM and the first Ctrl-C only set a flag, which the job looks at once a step, to save and
    leave. Another Ctrl-C does at once what it did before. A block in such a block has the same flag."""
    global _stop
    if _stop is not None:
        yield _stop
        return
    _stop = stop = Stop()
    # Python lets no other thread handle signals; one that is ignored (nohup) stays so.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}

    def on_signal(number: int, frame: object) -> None:
        if stop.since is None:
            stop.since = time.monotonic()
            if start().is_main:  # not through sys.stderr: its buffer may be in use just now
                more = "; Ctrl-C once more ends it at once" if number == signal.SIGINT else ""
                os.write(2, f"\nasked to stop: finishing what is begun, then saving{more}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - stop.since > SAME_PRESS:
            signal.signal(number, before[signal.SIGINT] or signal.SIG_DFL)
            signal.raise_signal(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        _stop = None
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error is but the echo of another process's end, in a collective call that it can no longer answer."""
    if not is_distributed():
        return False
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in _LOST)


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


def close() -> bool:
    """Leave the group; whether there was one of several processes. Without this two-rank jobs end in SIGABRT now and then."""
    if not is_distributed():
        return False
    several: bool = torch.distributed.get_world_size() > 1
    torch.distributed.destroy_process_group()
    return several


def end(status: int = 0) -> None:
    """Of a job of several processes, whose group is left and whose work is written: end this one here.

    What is registered for its exit runs. The threads of libraries are not taken down one by one: about one in some hundred
    two-rank jobs ended in SIGABRT meanwhile, which a launcher reports as a failed job."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
