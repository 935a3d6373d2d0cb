"""What goes over the wire: the law of a draw, what is asked of a row, and what is known of it when it has ended.

    trainer   Law, Ask ── JSON in `extra_args` of a request ──> plugin          a token a step, drawn and written down
              Answer   <── JSON of `/collective_rpc steerl_take` ── plugin      arrays as base64

Both sides import this file; it needs torch alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.decoding.settings import Sampling

VERSION = 2
"""Of this wire: trainer and server have one, or say so."""
HERE = ("n", "batch_size", "batch_tokens", "compile")
"""Settings of `sampling` that are the trainer's own."""


@dataclass(frozen=True)
class Law:
    """What all rows of a draw have in common. It stands in for a policy where distribution and stops are made."""

    sampling: Sampling
    vocab_size: int
    eos_ids: tuple[int, ...]
    tokenizer_path: str = ""
    """A folder that holds the tokenizer, where bad words or stop strings are to be spelled."""

    is_seq2seq = False

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_path)

    @property
    def end_id(self) -> int | None:
        """An id that ends every row that draws it: what a row that has ended tells vLLM."""
        return next(iter((*self.eos_ids, *self.sampling.stop_ids)), None)

    @property
    def spells(self) -> bool:
        return bool(self.sampling.stop or self.sampling.bad_words)

    @cached_property
    def text(self) -> str:
        """As it is sent, and as the plugin knows it."""
        sampling = {name: value for name, value in asdict(self.sampling).items() if name not in HERE}
        path = self.tokenizer_path if self.spells else ""
        return json.dumps([sampling, self.vocab_size, list(self.eos_ids), path], sort_keys=True)

    @staticmethod
    def of_text(text: str) -> Law:
        sampling, vocab_size, eos_ids, path = json.loads(text)
        return Law(Sampling(**sampling), vocab_size, tuple(eos_ids), path)


@dataclass(frozen=True)
class Ask:
    """One row: who it is (which decides every draw) and how it is steered."""

    id: str
    """By which the answer is fetched; new for every ask."""
    step: int
    row: int
    sample: int
    forced: tuple[int, ...] = ()
    """Ids that are taken instead of drawn ones, so that the server says what it holds of them."""
    steering: str = ""
    """The name under which the plugin was given a steering; empty: plain."""
    strengths: tuple[float, ...] = ()
    """Of each of its sites."""
    positions: tuple[tuple[int, ...], ...] = ()
    """Of each of its sites, the prompt positions that a data column gave."""
    noise_step: int = 0
    """The policy's step that the noise of its sites is drawn for."""
    first: int = 0
    """The place in the response of the first token that is drawn: in later turns what the row holds already lies before it."""
    limit: int = 0
    """Most tokens; 0 = the law's."""
    turns: tuple[tuple[int, int], ...] = ()
    """Runs of the ids that are sent which the policy drew in earlier turns."""

    def most(self, law: Law) -> int:
        return self.limit or law.sampling.max_new_tokens

    def arguments(self, law: Law) -> dict[str, object]:
        """`extra_args` of the request."""
        return {"steerl": json.dumps({"law": law.text, **asdict(self)})}

    @staticmethod
    def read(arguments: Mapping[str, Any] | None) -> tuple[str, Ask] | None:
        """(text of the law, ask); None where a request is not the trainer's."""
        if not arguments or "steerl" not in arguments:
            return None
        given = json.loads(arguments["steerl"])
        law = given.pop("law")
        lists: dict[str, Any] = {name: tuple(tuple(places) for places in given.pop(name)) for name in ("positions", "turns")}
        lists |= {name: tuple(given.pop(name)) for name in ("forced", "strengths")}
        return law, Ask(**given, **lists)


@dataclass
class Answer:
    """A row that has ended: a number of each kind for every token."""

    ids: list[int] = field(default_factory=list)
    behaviour: list[float] = field(default_factory=list)
    policy: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    kept: list[list[int]] | None = None
    """Where the mask is replayed: what could be drawn at each token; empty where all could."""
    stop: int = 0
    """Why it ended, as `Rollout.stop_B` says it."""
    bad: int = -1
    """The token whose logits were no distribution."""
    versions: tuple[int, int] = (-1, -1)
    """The weights that drew the first token and the last one."""
    edits: list[int] = field(default_factory=list)
    """Of each site of its steering: activations that were edited."""

    def packed(self) -> dict[str, object]:
        numbers = torch.tensor([self.behaviour, self.policy, self.entropy], dtype=torch.float32)
        kept = {}
        if self.kept is not None:
            flat = [i for ids in self.kept for i in ids]
            kept = {"kept": _pack(torch.tensor(flat, dtype=torch.int32)), "counts": [len(ids) for ids in self.kept]}
        rest = {"stop": self.stop, "bad": self.bad, "versions": list(self.versions), "edits": self.edits}
        return {"ids": self.ids, "numbers": _pack(numbers), **kept, **rest}

    @staticmethod
    def of_packed(given: Mapping[str, Any]) -> Answer:
        behaviour, policy, entropy = _unpack(given["numbers"], torch.float32).view(3, -1).tolist()
        kept = None
        if "kept" in given:
            kept = [ids.tolist() for ids in _unpack(given["kept"], torch.int32).split(given["counts"])]
        first, last = given["versions"]
        return Answer(
            list(given["ids"]),
            behaviour,
            policy,
            entropy,
            kept,
            given["stop"],
            given["bad"],
            (first, last),
            list(given["edits"]),
        )


def _pack(tensor: Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def _unpack(text: str, dtype: torch.dtype) -> Tensor:
    data = bytearray(base64.b64decode(text))
    return torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
