"""Run by .venv-tools' Python: other projects' own readers open our exports, and say on the last line what they found, as JSON.

readers.py verifiers traces.jsonl FOLDER ...    readers.py inspect log.eval ...    readers.py openai messages.jsonl ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def verifiers(traces: Path, folder: Path) -> dict[str, Any]:
    """Traces a line each, and the folder of episodes that holds the same."""
    from verifiers.v1.trace import WireTrace
    from verifiers.v1.utils.trace_store import read_episodes

    found = [WireTrace.model_validate_json(line) for line in traces.read_text().split("\n")[:-1]]
    again = [episode.traces for episode in read_episodes(folder, WireTrace)]
    assert [[trace.model_dump()] for trace in found] == [[one.model_dump() for one in traces] for traces in again]
    assert len({trace.id for trace in found}) == len(found)
    rows = []
    for trace in found:
        (branch,) = trace.branches
        assert WireTrace.model_validate(trace.to_record(float_decimals=None)).nodes == trace.nodes
        rows.append(
            {
                "ids": branch.token_ids,
                "mask": branch.sampled_mask,
                "logprobs": branch.logprobs,
                "trainer_logprobs": branch.trainer_logprobs,
                "reference_logprobs": branch.reference_logprobs,
                "advantages": branch.advantages,
                "entropies": branch.entropies,
                "messages": [message.model_dump(exclude_none=True) for message in branch.messages],
                "tokens": [len(node.token_ids) for node in branch.nodes],
                "sampled": [node.sampled for node in branch.nodes],
                "reward": trace.reward,
                "metrics": trace.metrics,
                "stop": trace.stop_condition,
                "truncated": trace.is_truncated,
                "ok": trace.ok,
                "errors": [error.message for error in trace.errors],
                "output_tokens": trace.num_output_tokens,
                "total_tokens": trace.num_total_tokens,
                "reply": trace.last_reply,
                "info": trace.info,
                "tools": [tool.name for tool in trace.tools],
            }
        )
    return {"rows": rows}


def inspect(path: Path) -> dict[str, Any]:
    """By its functions and its data frames."""
    from inspect_ai.analysis import evals_df, messages_df, samples_df
    from inspect_ai.log import list_eval_logs, read_eval_log, read_eval_log_sample_summaries, read_eval_log_samples

    log = read_eval_log(str(path), resolve_attachments=True)
    one_by_one = list(read_eval_log_samples(str(path), all_samples_required=True))
    assert {sample.uuid: sample for sample in one_by_one} == {sample.uuid: sample for sample in log.samples or []}
    assert path.name in [Path(found.name).name for found in list_eval_logs(str(path.parent))]
    evals, samples, messages = evals_df(str(path)), samples_df(str(path)), messages_df(str(path))
    return {
        "status": log.status,
        "model": log.eval.model,
        "samples": [sample.model_dump(mode="json", exclude_none=True) for sample in log.samples or []],
        "summaries": [one.model_dump(mode="json", exclude_none=True) for one in read_eval_log_sample_summaries(str(path))],
        "means": {score.name: score.metrics["mean"].value for score in (log.results and log.results.scores) or []},
        "stderrs": {score.name: score.metrics["stderr"].value for score in (log.results and log.results.scores) or []},
        "evals": evals.shape[0],
        "columns": list(samples.columns),
        "rewards": samples["score_reward"].dropna().tolist() if "score_reward" in samples else [],
        "said": messages["content"].tolist(),
    }


def openai(path: Path) -> dict[str, Any]:
    """Each message by the type of its role, which forbids what OpenAI does not know."""
    from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
    from pydantic import TypeAdapter

    messages, tools = TypeAdapter(list[ChatCompletionMessageParam]), TypeAdapter(list[ChatCompletionToolParam])
    rows = []
    for line in path.read_text().split("\n")[:-1]:
        row = json.loads(line)
        assert row.keys() <= {"messages", "tools"}
        for message in row["messages"]:
            assert message.pop("weight", 0) == 0
        rows.append(json.loads(messages.dump_json(messages.validate_python(row["messages"]))))
        tools.validate_python(row.get("tools", []))
    return {"rows": rows}


if __name__ == "__main__":
    reader, paths = globals()[sys.argv[1]], list(map(Path, sys.argv[2:]))
    each = reader.__code__.co_argcount
    print(json.dumps([reader(*paths[i : i + each]) for i in range(0, len(paths), each)]))
