"""Rollout: the frozen record that every other room reads, and Texts, what travels beside it.

Sizes: B rows, P prompt width (left-padded), R response width (right-padded), S = P + R, V vocabulary, D width. They are
suffixes of tensor names everywhere, because the one dangerous slice is whole sequence against response.

    prompt_BP     . . p p p        the last prompt token sits at P - 1, whatever its length
    response_BR             r r e .    lengths_B counts the actions, a stop token included
    sequences_BS  . . p p p r r e .    joined by hand: position P + t - 1 predicts response token t

Example: two rows, one stopped by itself after two tokens, the other cut at three:

    Rollout(
        prompt_BP=tensor([[0, 5], [4, 5]]), prompt_mask_BP=tensor([[False, True], [True, True]]),
        response_BR=tensor([[7, 2, 0], [7, 8, 9]]), lengths_B=tensor([2, 3]), ended_B=tensor([True, False]),
        behaviour_logprobs_BR=..., policy_logprobs_BR=..., row_B=tensor([0, 1]), sample_B=tensor([0, 0]),
        temperature=1.0, policy_step=0, steering="",
    )
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerl.rollout.common.errors import UserError

STOP_LENGTH, STOP_EOS, STOP_USER = 0, 1, 2
STOP_REASONS = ("length", "eos", "stop")
"""What ended a row, by `stop_B`: the limit, one of the checkpoint's stop ids, a stop id or stop string of the user's."""

# field -> (dimensions, dtype). The order is the order in which a wrong field is reported.
_TENSORS: dict[str, tuple[str, torch.dtype]] = {
    "prompt_BP": ("BP", torch.int64),
    "prompt_mask_BP": ("BP", torch.bool),
    "response_BR": ("BR", torch.int64),
    "lengths_B": ("B", torch.int64),
    "ended_B": ("B", torch.bool),
    "behaviour_logprobs_BR": ("BR", torch.float32),
    "policy_logprobs_BR": ("BR", torch.float32),
    "row_B": ("B", torch.int64),
    "sample_B": ("B", torch.int64),
    "stop_B": ("B", torch.int64),
    "strength_B": ("B", torch.float32),
    "entropy_BR": ("BR", torch.float32),
}
_PAD = {"prompt_mask_BP": False, "ended_B": False}

Lists = Sequence[Sequence[Any] | Tensor]
"""A list for each row, as long as the row's own tokens."""


def left_pad(ids: Lists, pad_id: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(prompt_BP, prompt_mask_BP) of token lists, whatever side the tokenizer would pad on."""
    prompt_BP = _table(ids, torch.int64, "left", pad_id)
    width, lengths_B = prompt_BP.shape[1], torch.tensor([len(row) for row in ids], dtype=torch.int64)
    return prompt_BP.to(device), (torch.arange(width)[None] >= width - lengths_B[:, None]).to(device)


def _table(lists: Lists, dtype: torch.dtype, side: str = "right", fill: int = 0) -> Tensor:
    rows = [torch.as_tensor(row, dtype=dtype) for row in lists]
    return pad_sequence(rows, True, fill, side) if rows else torch.zeros(0, 0, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """B sampled responses with both log-probs of every token. Masked entries hold 0; masks are True where real."""

    prompt_BP: Tensor
    """Left-padded prompt ids; the encoder's input for encoder-decoders."""
    prompt_mask_BP: Tensor
    response_BR: Tensor
    """Ids exactly as sampled, never decoded and encoded again; 0 beyond a row's end."""
    lengths_B: Tensor
    """Actions per row, the stop token counted. Masks come from this, never from comparing with pad."""
    ended_B: Tensor
    """Stopped by itself (any stop token or stop string); False = cut at the limit."""
    behaviour_logprobs_BR: Tensor
    """Under the distribution that each token was really drawn from: steered, after every processor."""
    policy_logprobs_BR: Tensor
    """Under the policy that PPO trains: log_softmax(raw logits / temperature), no processors."""
    row_B: Tensor
    sample_B: Tensor
    temperature: float = 1.0
    policy_step: int = 0
    steering: str = ""
    """Name and hash of the intervention that was active while sampling; empty when there was none."""
    start_ids: tuple[int, ...] = ()
    """What every decoder row starts with (decoder start, forced bos); empty for decoder-only models."""
    greedy: bool = False
    """Greedy rows were not drawn, so no weight corrects them: both log-probs are then the policy's at temperature 1."""
    stop_B: Tensor = field(default=None)  # type: ignore[assignment]
    """Index into STOP_REASONS; derived from ended_B (eos) where it is not given."""
    strength_B: Tensor = field(default=None)  # type: ignore[assignment]
    """The steering strength of each row; 0 = not steered."""
    entropy_BR: Tensor | None = None
    """Entropy of the policy at each action, at the temperature; None where it was not recorded (a rollout read from a dump)."""

    def __post_init__(self) -> None:
        if not isinstance(self.ended_B, Tensor):
            raise UserError(f"Rollout.ended_B: expected a bool tensor, found {type(self.ended_B).__name__}")
        if self.stop_B is None:
            object.__setattr__(self, "stop_B", self.ended_B.long() * STOP_EOS)
        if self.strength_B is None:
            object.__setattr__(self, "strength_B", torch.zeros(self.ended_B.shape, device=self.ended_B.device))
        sizes: dict[str, tuple[int, str]] = {}
        for name, (dims, dtype) in _TENSORS.items():
            value = getattr(self, name)
            if name == "entropy_BR" and value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype != dtype:
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise UserError(f"Rollout.{name}: expected a tensor of {dtype}, found {found}")
            if value.dim() != len(dims):
                raise UserError(f"Rollout.{name}: expected {len(dims)} dimension(s) ({dims}), found shape {tuple(value.shape)}")
            for dim, size in zip(dims, value.shape, strict=True):
                known, first = sizes.setdefault(dim, (size, name))
                if known != size:
                    raise UserError(f"Rollout.{name}: expected {dim} = {known} as in {first}, found shape {tuple(value.shape)}")
        if self.lengths_B.numel() and (int(self.lengths_B.min()) < 0 or int(self.lengths_B.max()) > self.response_width):
            raise UserError(f"Rollout.lengths_B: expected 0 to R = {self.response_width}, found {self.lengths_B.tolist()}")

    @staticmethod
    def of_ids(
        prompts: Lists, responses: Lists, *, pad_id: int = 0, device: torch.device | str = "cpu", **fields: Any
    ) -> Rollout:
        """A rollout of token lists at hand. `fields` are others of its fields, as lists or tensors: a number a row (`_B`), or a
        list a row (`_BR`). Not given: log-probs 0, rows 0, 1, ..., their first sample, all of them ended."""
        rows = len(prompts)
        prompt_BP, prompt_mask_BP = left_pad(prompts, pad_id, device)
        response_BR = _table(responses, torch.int64)
        lengths_B = torch.tensor([len(row) for row in responses], dtype=torch.int64)
        zeros_BR = torch.zeros(response_BR.shape)
        others: dict[str, Any] = {
            "response_BR": response_BR, "lengths_B": lengths_B, "row_B": range(rows), "sample_B": [0] * rows,
            "ended_B": [True] * rows, "behaviour_logprobs_BR": zeros_BR, "policy_logprobs_BR": zeros_BR, **fields,
        }  # fmt: skip
        for name in others.keys() & _TENSORS.keys():
            dims, dtype = _TENSORS[name]
            value = others[name] if isinstance(others[name], Tensor) or dims == "B" else _table(others[name], dtype)
            others[name] = torch.as_tensor(value, dtype=dtype, device=device)
        return Rollout(prompt_BP=prompt_BP, prompt_mask_BP=prompt_mask_BP, **others)

    # -- derived ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.prompt_BP.shape[0])

    @property
    def prompt_width(self) -> int:
        return int(self.prompt_BP.shape[1])

    @property
    def response_width(self) -> int:
        return int(self.response_BR.shape[1])

    @property
    def device(self) -> torch.device:
        return self.prompt_BP.device

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.start_ids)

    @property
    def mask_BR(self) -> Tensor:
        """True at every action."""
        return torch.arange(self.response_width, device=self.device)[None] < self.lengths_B[:, None]

    @property
    def last_B(self) -> Tensor:
        """Index of each row's last action (the stop token, or the last token of a cut row); 0 for an empty row."""
        return (self.lengths_B - 1).clamp(min=0)

    @property
    def start_BK(self) -> Tensor:
        start = torch.tensor(self.start_ids, dtype=torch.int64, device=self.device)
        return start[None].expand(len(self), -1)

    @property
    def sequences_BS(self) -> Tensor:
        """Prompt and response joined by hand; for encoder-decoders the decoder's own sequence, start and response."""
        return torch.cat([self.start_BK if self.is_encoder_decoder else self.prompt_BP, self.response_BR], dim=1)

    @property
    def sequences_mask_BS(self) -> Tensor:
        start = torch.ones_like(self.start_BK, dtype=torch.bool) if self.is_encoder_decoder else self.prompt_mask_BP
        return torch.cat([start, self.mask_BR], dim=1)

    # -- views of the rows ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    def select(self, index: Tensor | Sequence[int] | slice) -> Rollout:
        """The rows of `index`, in its order; widths stay."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.device)
            index = index if index.numel() else index.long()  # an empty list has no type of its own
        chosen: dict[str, Any] = {name: value[index] for name, value in self.tensors().items()}
        return dataclasses.replace(self, **chosen)

    def trim(self) -> Rollout:
        """Without the columns in which no row has a token."""
        prompt = self.prompt_width - int(self.prompt_mask_BP.sum(1).max()) if len(self) else 0
        response = max(int(self.lengths_B.max()), 1) if len(self) else 0
        cut: dict[str, Any] = {}
        for name, value in self.tensors().items():
            dims = _TENSORS[name][0]
            cut[name] = value[:, prompt:] if dims == "BP" else value[:, :response] if dims == "BR" else value
        return dataclasses.replace(self, **cut)

    def pad_to(self, prompt_width: int, response_width: int) -> Rollout:
        """Wider: prompts grow on the left, responses on the right, with values that mean nothing (masked, 0)."""
        left, right = prompt_width - self.prompt_width, response_width - self.response_width
        if left < 0 or right < 0:
            raise UserError(f"Rollout.pad_to({prompt_width}, {response_width}): the rollout is wider already")
        wide: dict[str, Any] = {}
        for name, value in self.tensors().items():
            dims = _TENSORS[name][0]
            pads = (left, 0) if dims == "BP" else (0, right) if dims == "BR" else None
            wide[name] = torch.nn.functional.pad(value, pads, value=_PAD.get(name, 0)) if pads else value
        return dataclasses.replace(self, **wide)

    def to(self, device: torch.device | str) -> Rollout:
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    @staticmethod
    def join(parts: Sequence[Rollout]) -> Rollout:
        """One rollout of all rows, padded to the widest. The parts must agree in everything that is not per row."""
        if not parts:
            raise UserError("Rollout.join: nothing to join")
        first = parts[0]
        for name in ("temperature", "policy_step", "steering", "start_ids", "greedy"):
            for part in parts:
                if getattr(part, name) != getattr(first, name):
                    found = f"{getattr(first, name)!r} and {getattr(part, name)!r}"
                    raise UserError(f"Rollout.join: {name} differs between the parts: {found}")
        prompt, response = max(p.prompt_width for p in parts), max(p.response_width for p in parts)
        wide = [p.pad_to(prompt, response) for p in parts]
        names = [n for n in _TENSORS if all(getattr(p, n) is not None for p in wide)]
        joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in wide]) for n in names}
        joined.setdefault("entropy_BR", None)
        return dataclasses.replace(first, **joined)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What the rows of a Rollout say, row by row in the same order: for rewards, sample tables and dumps."""

    prompts: list[Any]
    """As read: a string, or a list of messages where the prompt is a conversation."""
    prompt_texts: list[str]
    """The prompt as the model saw it, rendered to one string (special tokens kept)."""
    completions: list[str]
    """As it goes on with the prompt's text (its blank too), without special tokens, ending before a matched stop string."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The dataset's other columns."""

    def __post_init__(self) -> None:
        rows = len(self.prompts)
        for name, column in {"prompt_texts": self.prompt_texts, "completions": self.completions, **self.columns}.items():
            if len(column) != rows:
                raise UserError(f"Texts.{name}: expected {rows} rows as in prompts, found {len(column)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, index: Sequence[int]) -> Texts:
        pick = [int(i) for i in index]
        return Texts(
            prompts=[self.prompts[i] for i in pick],
            prompt_texts=[self.prompt_texts[i] for i in pick],
            completions=[self.completions[i] for i in pick],
            columns={name: [column[i] for i in pick] for name, column in self.columns.items()},
        )

    @staticmethod
    def join(parts: Sequence[Texts]) -> Texts:
        names = dict.fromkeys(name for part in parts for name in part.columns)
        return Texts(
            prompts=[x for p in parts for x in p.prompts],
            prompt_texts=[x for p in parts for x in p.prompt_texts],
            completions=[x for p in parts for x in p.completions],
            columns={n: [x for p in parts for x in p.columns.get(n, [None] * len(p))] for n in names},
        )
