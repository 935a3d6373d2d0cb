"""From a scored dump to a dataset: which rows are the best, the worst, good enough, or a pair to learn a preference from.

    dump (rollouts-*.parquet) + scores (scores-*.parquet)
        read_scores -> score of every (prompt, sample)   choose -> which rows   selected -> records, streamed

Records are what the stages read: {prompt, completion} for train_sft, {prompt, chosen, rejected} for train_reward;
texts where the prompts are texts, messages where they are conversations. The completion of an episode is all that follows its
prompt; who said what of it stands beside it (`episode`), as in the dump.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steerl.reward.settings import SelectionSettings
from steerl.rollout.common.errors import DataError
from steerl.rollout.dumps.manifest import Plan, load_manifest, plan_of
from steerl.rollout.dumps.store import read_dump
from steerl.rollout.prompts.chat import TEMPLATE_COLUMNS, answered, continued, continues
from steerl.rollout.types import row_name

KEYS = ("prompt_index", "sample_index")


def score_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("scores-*.parquet"))


def read_scores(folder: Path, plan: Plan) -> dict[str, np.ndarray]:
    """Each score column as an array over (prompt * samples + sample); NaN where a row has no score."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, np.ndarray] = {}
    seen = np.zeros(plan.rows, dtype=bool)
    for path in score_files(folder):
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not readable ({error}); score the dump again") from error
        if missing := [name for name in KEYS if name not in table.column_names]:
            raise DataError(f"{path}: no column {', '.join(missing)}; these are not the scores of score_rollouts.py")
        prompts, samples = (table.column(name).to_numpy().astype(np.int64) for name in KEYS)
        keys = prompts * plan.samples + samples
        if len(keys) and (keys.min() < 0 or keys.max() >= plan.rows or samples.max() >= plan.samples):
            raise DataError(f"{path}: scores of rows that the dump does not have; name the scores of this dump")
        if seen[keys].any() or len(np.unique(keys)) != len(keys):
            raise DataError(f"{path}: rows that are scored twice in {folder}; score the dump again into a fresh folder")
        seen[keys] = True
        for name in table.column_names:
            if name not in KEYS:
                column = found.setdefault(name, np.full(plan.rows, np.nan, dtype=np.float64))
                column[keys] = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    return found


def read_whole_scores(folder: Path, plan: Plan, name: str) -> dict[str, np.ndarray]:
    """read_scores, where every row has a score in the column `name`."""
    columns = read_scores(folder, plan)
    if not columns:
        raise DataError(
            f"{folder}: no scores-*.parquet; score the dump with score_rollouts.py, or name its scores with --scores DIR"
        )
    if name not in columns:
        raise DataError(f"select.score: {name!r} is no column of the scores; there are {', '.join(columns)}")
    if (missing := np.isnan(columns[name])).any():
        prompt, sample = divmod(int(missing.argmax()), plan.samples)
        told = f"{int(missing.sum())} of {plan.rows} rows have no score, the first prompt {prompt} sample {sample}"
        raise DataError(f"{folder}: {told}; score the whole dump first")
    return columns


def choose(score_PN: np.ndarray, keep_PN: np.ndarray, selection: SelectionSettings) -> tuple[np.ndarray, np.ndarray]:
    """(kept_PN, second_PN) of P prompts with N samples each: the rows kept (pairs: the best), and the worst of pairs.

    Only rows with `keep_PN` count; of equal scores the earlier sample goes first.
    """
    none = np.zeros(score_PN.shape, dtype=bool)
    if selection.mode == "reject":
        assert selection.threshold is not None
        return keep_PN & (score_PN >= selection.threshold), none
    if selection.mode == "pairs":
        best, worst = _top(score_PN, keep_PN, 1), _top(-score_PN, keep_PN, 1)
        gap_P = np.where(best, score_PN, 0).sum(1) - np.where(worst, score_PN, 0).sum(1)
        good_P = keep_PN.any(1) & (gap_P > selection.min_gap)
        return best & good_P[:, None], worst & good_P[:, None]
    sign = 1.0 if selection.mode == "best" else -1.0
    if selection.threshold is not None:
        keep_PN = keep_PN & (sign * score_PN >= sign * selection.threshold)
    return _top(sign * score_PN, keep_PN, selection.count), none


def _top(score_PN: np.ndarray, keep_PN: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(np.where(keep_PN, -score_PN, np.inf), axis=1, kind="stable")
    top = np.zeros(score_PN.shape, dtype=bool)
    np.put_along_axis(top, order[:, :count], True, axis=1)
    return np.asarray(top & keep_PN)


def selected(folder: Path, scores: Path, selection: SelectionSettings) -> Iterator[dict[str, object]]:
    """The records, in the order of the prompts. Memory: one number per row, and the texts of one prompt."""
    plan = plan_of(load_manifest(folder))
    columns = read_whole_scores(scores, plan, selection.score)
    score_PN = columns[selection.score].reshape(plan.prompts, plan.samples)
    for prompt, rows in _by_prompt(folder):
        yield from _of_prompt(prompt, rows, score_PN[prompt], selection)


@dataclass(frozen=True)
class _Row:
    sample: int
    prompt: object
    completion: str
    ended: bool
    said: object
    """The completion in the form of its prompt: text, or messages, the first with what the prompt had begun of it."""
    others: dict[str, object]
    """What a chat template is given beside the messages, as JSON text."""
    episode: dict[str, str]


def _by_prompt(folder: Path) -> Iterator[tuple[int, list[_Row]]]:
    rows: list[_Row] = []
    current = -1
    for rollout, texts in read_dump(folder):
        if bool((fed_B := rollout.actions_B < rollout.lengths_B).any()) and texts.episodes is None:
            name = row_name(rollout, int(fed_B.nonzero()[0]))
            told = "was fed tokens that the policy did not draw, which a record of prompt and completion cannot tell apart"
            raise DataError(f"{folder}: {name} {told}; read such rows with read_dump, action_mask_BR says which they are")
        for i, (prompt, sample, ended) in enumerate(
            zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), rollout.ended_B.tolist(), strict=True)
        ):
            if prompt != current and rows:
                yield current, rows
                rows = []
            current = prompt
            asked, completion = texts.prompts[i], texts.completions[i]
            others = {name: texts.columns[name][i] for name in TEMPLATE_COLUMNS if name in texts.columns}
            whole = {} if texts.episodes is None else {"episode": json.dumps(texts.episodes[i].as_json())}
            if isinstance(asked, str):
                rows.append(_Row(sample, asked, completion, ended, completion, {}, whole))
                continue
            extra = others.get("chat_template_kwargs")
            if texts.episodes is None:
                turns = answered(asked, completion, extra, texts.prompt_texts[i])
            else:
                turns = continued(asked, texts.episodes[i].messages, extra, texts.prompt_texts[i])
            others = {n: v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in others.items()}
            before = len(asked) - continues(asked, extra)
            rows.append(_Row(sample, turns[:before], completion, ended, turns[before:], others, whole))
    if rows:
        yield current, rows


def _of_prompt(prompt: int, rows: list[_Row], score_N: np.ndarray, selection: SelectionSettings) -> Iterator[dict[str, object]]:
    rows = sorted(rows, key=lambda row: row.sample)
    keep_N = np.array([row.ended or not selection.ended for row in rows])
    if selection.unique:
        first: set[str] = set()
        sign = 1.0 if selection.mode == "worst" else -1.0
        for i in sorted(np.flatnonzero(keep_N).tolist(), key=lambda i: sign * score_N[i]):
            keep_N[i] = rows[i].completion not in first
            first.add(rows[i].completion)
    kept, second = (chosen[0] for chosen in choose(score_N[None], keep_N[None], selection))
    numbers = {"prompt_index": prompt}
    if selection.mode == "pairs":
        for best, worst in zip(np.flatnonzero(kept).tolist(), np.flatnonzero(second).tolist(), strict=True):
            if rows[best].completion == rows[worst].completion:
                continue
            chosen, rejected = rows[best].said, rows[worst].said
            scores = {"chosen_score": float(score_N[best]), "rejected_score": float(score_N[worst])}
            told = {f"chosen_{name}": value for name, value in rows[best].episode.items()}
            told |= {f"rejected_{name}": value for name, value in rows[worst].episode.items()}
            yield {
                "prompt": rows[best].prompt,
                "chosen": chosen,
                "rejected": rejected,
                **rows[best].others,
                **told,
                **numbers,
                **scores,
            }
        return
    for i in np.flatnonzero(kept).tolist():
        said = {"prompt": rows[i].prompt, "completion": rows[i].said, **rows[i].others, **rows[i].episode}
        yield {**said, **numbers, "sample_index": rows[i].sample, "score": float(score_N[i])}
