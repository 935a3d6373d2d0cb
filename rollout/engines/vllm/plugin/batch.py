"""What vLLM's model runner has under way: which tokens of its flat batch belong to which request. All that is read of it.

flat batch   | row 0: 5 prompt tokens | row 1: 1 | row 2: 1 | row 3: 3 of 9 prompt tokens |     + padding
logits       |          row 0         |    1     |    2     |    3 (drawn for nothing)    |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Part(NamedTuple):
    """One request of the step."""

    request: str
    start: int
    """Its tokens in the flat batch: from here,"""
    end: int
    """up to here."""
    first: int
    """The position of the first of them in its own text, counted from 0."""
    unfinished: bool
    """More of its text is to be read before a token is drawn."""

    @property
    def last(self) -> int:
        return self.first + self.end - self.start - 1


def parts(runner: Any) -> Iterator[Part]:
    """The requests of the step under way, in the order of the logits."""
    batch = runner.input_batch
    count = batch.num_reqs
    starts = runner.query_start_loc.np[: count + 1].tolist()
    firsts = batch.num_computed_tokens_cpu[:count].tolist()
    unfinished = runner.discard_request_mask.np[:count].tolist()
    for at in range(count):
        yield Part(batch.req_ids[at], starts[at], starts[at + 1], firsts[at], bool(unfinished[at]))


def arguments(runner: Any, request: str) -> tuple[dict[str, Any] | None, list[int]]:
    """(extra_args, prompt ids) of a request."""
    known = runner.requests[request]
    params = known.sampling_params
    return (None if params is None else params.extra_args), list(known.prompt_token_ids or ())
