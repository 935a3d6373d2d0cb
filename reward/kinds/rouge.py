"""ROUGE of summaries against references, by the maintained rouge_score package: as a report, and as a reward.

reward:
  - {name: rouge, kind: function, function: "steerl.reward.kinds.rouge:rouge_l"}     # references in the data's column `summary`
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steerl.rollout.common.errors import UserError
from steerl.rollout.episodes import Episode
from steerl.rollout.prompts.chat import text_of

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
COLUMNS = ("summary", "reference", "completion", "highlights")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of each kind over the rows, from 0 to 1."""
    if len(predictions) != len(references) or not references:
        raise UserError(
            f"rouge: {len(predictions)} predictions and {len(references)} references; give as many, and at least one"
        )
    rows = [_scorer().score(_lines(r), _lines(p)) for p, r in zip(predictions, references, strict=True)]
    return {kind: sum(row[kind].fmeasure for row in rows) / len(rows) for kind in KINDS}


def rouge_l(prompts: Sequence[object], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
    """ROUGE-L of each completion against its row's reference summary. Of several turns the policy's last one is read."""
    name = next((name for name in COLUMNS if name in columns), None)
    if name is None:
        raise UserError(
            f"rouge_l: the data has no reference, a column named {' or '.join(COLUMNS)}; it has: {', '.join(columns)}"
        )
    pairs = zip(map(_last, completions, columns.get("episodes") or [None] * len(completions)), columns[name], strict=True)
    return [_scorer().score(reference, completion)["rougeL"].fmeasure for completion, reference in pairs]


def _last(completion: Any, episode: Episode | None) -> str:
    """What the policy said last, of a text, of messages, of an episode."""
    if episode is not None:
        return "".join(turn.text for turn in episode.turns[-1:])
    return completion if isinstance(completion, str) else text_of(completion[-1]["content"])


@functools.cache
def _scorer() -> RougeScorer:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError("ROUGE needs the package rouge_score; pip install 'steerl[rouge]'") from error
    return rouge_scorer.RougeScorer(list(KINDS), use_stemmer=True)


def _lines(text: str) -> str:
    """A sentence a line, as rougeLsum wants it."""
    return "\n".join(part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part)
