"""The records of sampling: Rollout, the frozen record that every other room reads; Texts, what its rows say; Samples, both.

Sizes: B rows, P prompt width (left-padded), R response width (right-padded), S = P + R, K steering sites, V vocabulary, D
width. They are suffixes of tensor names everywhere, because the one dangerous slice is whole sequence against response.

    prompt_BP       . . p p p              the last prompt token sits at P - 1, whatever its length
    response_BR               r r e o o r e .  everything after the prompt: what the policy drew, and what it was fed (o)
    lengths_B                 7                the extent of the response: widths, padding, positions, memory
    action_mask_BR            1 1 1 0 0 1 1 0  what the policy drew: log-probs, credit, losses, means, counts
    sequences_BS    . . p p p r r e o o r e .  joined by hand: position P + t - 1 predicts response token t

Example: two rows, one stopped by itself after two tokens, the other of two turns and cut at five; in between it was fed 3:

    Rollout.of_ids(
        [[5], [4, 5]], [[7, 2], [7, 8, 3, 9, 9]], action_mask_BR=[[1, 1], [1, 1, 0, 1, 1]], ended_B=[True, False],
        behaviour_logprobs_BR=..., policy_logprobs_BR=...,
    )
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import UserError
from steerl.rollout.episodes import Episode
from steerl.rollout.ragged import Kept, Lists, left_pad, runs, table

STOP_LENGTH, STOP_EOS, STOP_USER = 0, 1, 2
STOP_REASONS = ("length", "eos", "stop")
"""What ended a row, by `stop_B`: the limit, one of the checkpoint's stop ids, a stop id or stop string of the user's."""

# field -> (dimensions, dtype). The order is the order in which a wrong field is reported. N: positions of a site, any number.
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
    "action_mask_BR": ("BR", torch.bool),
    "strength_BK": ("BK", torch.float32),
    "positions_BKN": ("BKN", torch.int64),
    "policy_step_B": ("B", torch.int64),
    "entropy_BR": ("BR", torch.float32),
}
_SHARED = ("temperature", "steering", "steering_seed", "start_ids", "greedy")
"""Fields that are the same for all rows."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """B sampled responses with both log-probs of every action. Masked entries hold 0; masks are True where real.

    The record is complete: whoever passes over its rows again needs nothing beside it to find the same numbers."""

    prompt_BP: Tensor
    """Left-padded prompt ids; the encoder's input for encoder-decoders."""
    prompt_mask_BP: Tensor
    response_BR: Tensor
    """Ids exactly as sampled or fed, never decoded and encoded again; 0 beyond a row's end."""
    lengths_B: Tensor
    """The extent of each response, the stop token counted. Masks come from this, never from comparing with pad."""
    ended_B: Tensor
    """Stopped by itself (any stop token or stop string); False = cut at the limit."""
    behaviour_logprobs_BR: Tensor
    """Under the distribution that each token was really drawn from: steered, after every processor."""
    policy_logprobs_BR: Tensor
    """Under the policy that PPO trains: log_softmax(raw logits / temperature) over the ids in `kept` (all without), no
    penalties and no bans."""
    row_B: Tensor
    sample_B: Tensor
    temperature: float = 1.0
    steering: str = ""
    """Name and hash of the intervention that was active while sampling; empty when there was none."""
    steering_seed: int | None = 0
    """What the noise of a steering was drawn with, beside the policy's step, row and sample; None where a dump does not say."""
    start_ids: tuple[int, ...] = ()
    """What every decoder row starts with (decoder start, forced bos); empty for decoder-only models."""
    greedy: bool = False
    """Greedy rows were not drawn, so no weight corrects them: both log-probs are then the policy's at temperature 1."""
    stop_B: Tensor = field(default=None)  # type: ignore[assignment]
    """Index into STOP_REASONS; derived from ended_B (eos) where it is not given."""
    action_mask_BR: Tensor = field(default=None)  # type: ignore[assignment]
    """True where the policy drew the token; False at what it was fed (tool results, later user turns) and beyond a row's end.
    The whole extent where it is not given."""
    strength_BK: Tensor = field(default=None)  # type: ignore[assignment]
    """What every steering site really applied to each row; 0 = the site left it alone. No sites (K = 0) without steering."""
    positions_BKN: Tensor = field(default=None)  # type: ignore[assignment]
    """Prompt positions that a data column gave a site, padded with -1; N = 0 where no site reads any, or none are recorded."""
    policy_step_B: Tensor = field(default=None)  # type: ignore[assignment]
    """Which weights drew each row: as after this many steps. -1 - n = none of this run's, after n steps of theirs (which the
    noise of a steering was drawn for); -1 where it is not given."""
    kept: Kept | None = None
    """Where the sampler truncated: what could be drawn at each action; None otherwise, or with `sampling.replay_mask` false."""
    entropy_BR: Tensor | None = None
    """Entropy of the policy at each action, at the temperature; None where it was not recorded (a rollout read from a dump)."""

    def __post_init__(self) -> None:
        for name in ("ended_B", "lengths_B", "response_BR"):
            if not isinstance(value := getattr(self, name), Tensor):
                raise UserError(f"Rollout.{name}: expected a tensor, found {type(value).__name__}")
        rows, device = len(self.ended_B), self.ended_B.device
        defaults: dict[str, Callable[[], Tensor]] = {
            "stop_B": lambda: self.ended_B.long() * STOP_EOS,
            "action_mask_BR": lambda: self.extent_BR,
            "strength_BK": lambda: torch.zeros(rows, 0, device=device),
            "positions_BKN": lambda: torch.zeros(rows, self.strength_BK.shape[1], 0, dtype=torch.int64, device=device),
            "policy_step_B": lambda: torch.full((rows,), -1, dtype=torch.int64, device=device),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default())
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
        beyond_B = (self.action_mask_BR & ~self.extent_BR).any(1)
        if bool(beyond_B.any()):
            row = int(beyond_B.nonzero()[0])
            raise UserError(f"Rollout.action_mask_BR: row {row} has actions beyond its length {int(self.lengths_B[row])}")
        if self.kept is not None and self.kept.counts_BR.shape != self.response_BR.shape:
            shape = tuple(self.kept.counts_BR.shape)
            raise UserError(f"Rollout.kept: expected counts of shape {tuple(self.response_BR.shape)}, found {shape}")

    @staticmethod
    def of_ids(
        prompts: Lists, responses: Lists, *, pad_id: int = 0, device: torch.device | str = "cpu", **fields: Any
    ) -> Rollout:
        """A rollout of token lists at hand. `fields` are others of its fields, as lists or tensors: a number a row (`_B`), or a
        list a row (`_BR`, `_BK`). Not given: log-probs 0, rows 0, 1, ..., their first sample, all of them ended, all tokens
        actions."""
        rows = len(prompts)
        prompt_BP, prompt_mask_BP = left_pad(prompts, pad_id, device)
        response_BR = table(responses, torch.int64)
        lengths_B = torch.tensor([len(row) for row in responses], dtype=torch.int64)
        zeros_BR = torch.zeros(response_BR.shape)
        others: dict[str, Any] = {
            "response_BR": response_BR, "lengths_B": lengths_B, "row_B": range(rows), "sample_B": [0] * rows,
            "ended_B": [True] * rows, "behaviour_logprobs_BR": zeros_BR, "policy_logprobs_BR": zeros_BR, **fields,
        }  # fmt: skip
        for name in others.keys() & _TENSORS.keys():
            dims, dtype = _TENSORS[name]
            value = table(others[name], dtype) if dims == "BR" and not isinstance(others[name], Tensor) else others[name]
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
    def extent_BR(self) -> Tensor:
        """True at every token of the response, whoever it is from."""
        return torch.arange(self.response_width, device=self.response_BR.device)[None] < self.lengths_B[:, None]

    @property
    def mask_BR(self) -> Tensor:
        """The actions, by the name that rewards of one-turn days know."""
        return self.action_mask_BR

    @property
    def actions_B(self) -> Tensor:
        """Actions of each row: what is counted, where tokens of the policy are."""
        return self.action_mask_BR.sum(1)

    @property
    def turns(self) -> list[list[tuple[int, int]]]:
        """Of each row the runs of actions, as (first, one past the last): the policy's turns."""
        return runs(self.action_mask_BR)

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [ids[mask].tolist() for ids, mask in zip(self.prompt_BP, self.prompt_mask_BP, strict=True)]

    @property
    def response_ids(self) -> list[list[int]]:
        """Of each row all that follows its prompt, whoever it is from."""
        return [ids[:n] for ids, n in zip(self.response_BR.tolist(), self.lengths_B.tolist(), strict=True)]

    @property
    def applied(self) -> Applied:
        """How the rows were steered."""
        return Applied(self.strength_BK, self.positions_BKN, self.policy_step_B, self.steering_seed)

    @property
    def strength_B(self) -> Tensor:
        """The first site's strength; 0 without steering."""
        return self.strength_BK[:, 0] if self.strength_BK.shape[1] else torch.zeros(len(self), device=self.device)

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
        return torch.cat([start, self.extent_BR], dim=1)

    # -- views of the rows ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    def select(self, index: Tensor | Sequence[int] | slice) -> Rollout:
        """The rows of `index`, in its order; widths stay."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.device)
            index = index if index.numel() else index.long()  # an empty list has no type of its own
        chosen: dict[str, Any] = {name: value[index] for name, value in self.tensors().items()}
        if self.kept is not None:
            chosen["kept"] = self.kept.select(torch.arange(len(self), device=self.device)[index])
        return dataclasses.replace(self, **chosen)

    def trim(self) -> Rollout:
        """Without the columns in which no row has a token."""
        prompt = self.prompt_width - int(self.prompt_mask_BP.sum(1).max()) if len(self) else 0
        response = max(int(self.lengths_B.max()), 1) if len(self) else 0
        if not prompt and response == self.response_width:
            return self
        cut: dict[str, Any] = {}
        for name, value in self.tensors().items():
            dims = _TENSORS[name][0]
            cut[name] = value[:, prompt:] if dims == "BP" else value[:, :response] if dims == "BR" else value
        return dataclasses.replace(self, **cut, kept=self.kept and self.kept.widened(response))

    def pad_to(self, prompt_width: int, response_width: int) -> Rollout:
        """Wider: prompts grow on the left, responses on the right, with values that mean nothing (masked, 0)."""
        left, right = prompt_width - self.prompt_width, response_width - self.response_width
        if left < 0 or right < 0:
            raise UserError(f"Rollout.pad_to({prompt_width}, {response_width}): the rollout is wider already")
        wide: dict[str, Any] = {}
        for name, value in self.tensors().items():
            dims = _TENSORS[name][0]
            pads = (left, 0) if dims == "BP" else (0, right) if dims == "BR" else None
            wide[name] = torch.nn.functional.pad(value, pads) if pads else value
        return dataclasses.replace(self, **wide, kept=self.kept and self.kept.widened(response_width))

    def to(self, device: torch.device | str) -> Rollout:
        if torch.device(device) == self.device:
            return self
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **moved, kept=self.kept and self.kept.to(device))

    @staticmethod
    def join(parts: Sequence[Rollout]) -> Rollout:
        """One rollout of all rows, padded to the widest. The parts must agree in everything that is not per row."""
        if not parts:
            raise UserError("Rollout.join: nothing to join")
        first = parts[0]
        for name in _SHARED:
            for part in parts:
                if getattr(part, name) != getattr(first, name):
                    found = f"{getattr(first, name)!r} and {getattr(part, name)!r}"
                    raise UserError(f"Rollout.join: {name} differs between the parts: {found}")
        prompt, response = max(p.prompt_width for p in parts), max(p.response_width for p in parts)
        wide = [p.pad_to(prompt, response) for p in parts]
        names = [n for n in _TENSORS if n != "positions_BKN" and all(getattr(p, n) is not None for p in wide)]
        if len(sites := {p.strength_BK.shape[1] for p in parts}) > 1:
            raise UserError(f"Rollout.join: the number of steering sites differs between the parts: {sorted(sites)}")
        joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in wide]) for n in names}
        joined |= Applied.join([p.applied for p in parts])._asdict()
        if any(p.kept for p in parts):
            kept = [p.kept or Kept(p.response_BR.new_zeros(0).int(), torch.zeros_like(p.response_BR)) for p in wide]
            joined["kept"] = Kept(torch.cat([k.ids for k in kept]), torch.cat([k.counts_BR for k in kept]))
        joined.setdefault("entropy_BR", None)
        return dataclasses.replace(first, **joined)


def row_name(rollout: Rollout, index: int) -> str:
    """How messages call a row: its place in the dataset and which sample of it."""
    return f"row {int(rollout.row_B[index])} sample {int(rollout.sample_B[index])}"


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
    episodes: list[Episode] | None = None
    """Where an environment took part: what was said, turn by turn. `completions` then hold all of it as one text."""

    def __post_init__(self) -> None:
        rows = len(self.prompts)
        others = {**self.columns, "episodes": self.episodes} if self.episodes is not None else self.columns
        for name, column in {"prompt_texts": self.prompt_texts, "completions": self.completions, **others}.items():
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
            episodes=None if self.episodes is None else [self.episodes[i] for i in pick],
        )

    @staticmethod
    def join(parts: Sequence[Texts]) -> Texts:
        names = dict.fromkeys(name for part in parts for name in part.columns)
        told = [part for part in parts if part.episodes is not None]
        return Texts(
            prompts=[x for p in parts for x in p.prompts],
            prompt_texts=[x for p in parts for x in p.prompt_texts],
            completions=[x for p in parts for x in p.completions],
            columns={n: [x for p in parts for x in p.columns.get(n, [None] * len(p))] for n in names},
            episodes=None if not told else [x for p in parts for x in (p.episodes or [])],
        )


class Samples(NamedTuple):
    """What a source of rollouts gives: the rows and what they say, always together."""

    rollout: Rollout
    texts: Texts

    def select(self, index: Tensor | Sequence[int]) -> Samples:
        return Samples(self.rollout.select(index), self.texts.select([int(i) for i in index]))

    def to(self, device: torch.device | str) -> Samples:
        return Samples(self.rollout.to(device), self.texts)

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        return Samples(Rollout.join([part.rollout for part in parts]), Texts.join([part.texts for part in parts]))
