"""The harness's tasks: found and loaded before the model is, so that what is wrong with them is told early."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from steerl.rollout.common.errors import ConfigError, one_line
from steerl.rollout.common.settings_reader import near_name


class Tasks(TaskManager):
    """The tasks of one evaluation, by names as the harness takes them: tasks, groups, tags, patterns, YAML files."""

    def __init__(self, asked: Sequence[str], folders: Sequence[str]):
        for folder in folders:
            if not Path(folder).is_dir():
                raise ConfigError(f"eval.include_path: {folder} is no folder; name one that holds tasks as YAML files")
        self.asked, self.folders = list(asked), list(folders)
        self.loaded: Any = None
        self.names: list[str] = []
        if not folders or self._look(whole=False):  # the harness's own tasks are 14,000 files: only where they are needed
            self._look(whole=True)

    def _look(self, whole: bool) -> list[str]:
        """Find the names, in the folders alone or among the harness's own too; those that are not there."""
        super().__init__(include_path=self.folders or None, include_defaults=whole)
        self.whole = whole
        found = {name: [name] if Path(name).is_file() else self.match_tasks([name]) for name in self.asked}
        self.names = list(dict.fromkeys(each for names in found.values() for each in names))
        lacking = [name for name, names in found.items() if not names]
        if not whole or not lacking:
            return lacking
        near = {name: near_name(name, self.all_tasks) for name in lacking}
        hints = {name: f"did you mean {near[name]}?" if near[name] else "lm-eval ls tasks lists them" for name in lacking}
        raise ConfigError(*(f"eval.tasks: there is no task {name!r}; {hints[name]}" for name in lacking))

    def load(self, task_list: Any) -> Any:
        """Once, whoever asks: the data is read (and fetched) here."""
        if self.loaded is None:
            try:
                self.loaded = super().load(task_list)
            except Exception as error:
                if not self.whole and isinstance(error, TypeError | KeyError):  # a group that names tasks of the harness
                    self._look(whole=True)
                    return self.load(self.names)
                offline = any(os.environ.get(name, "") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
                hint = "; HF_HUB_OFFLINE is set, and what is not here cannot be fetched" if offline else ""
                if isinstance(error, ConnectionError) and not offline:
                    hint = "; load it once where there is a network: from then on it is read from the cache"
                raise ConfigError(f"eval.tasks: {', '.join(task_list)}: {one_line(error)}{hint}") from error
        return self.loaded

    def check(self, *, unsafe: bool, generation: dict[str, object]) -> None:
        """Read them, and see that the settings have a task that they are for."""
        tasks = list(self.load(self.names)["tasks"].items())
        dangerous = [name for name, task in tasks if getattr(task, "UNSAFE_CODE", False)]
        if dangerous and not unsafe:
            raise ConfigError(
                f"eval.tasks: {', '.join(dangerous)} runs code that the model writes; "
                "add --eval.confirm_run_unsafe_code true where that may be"
            )
        if generation and not any(task.get_config("output_type") == "generate_until" for _, task in tasks):
            raise ConfigError("eval.gen_kwargs: has no effect, for none of the tasks generates; leave it out")
