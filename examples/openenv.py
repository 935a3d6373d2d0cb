"""An environment of OpenEnv's form, reset() and step(action) -> observation, reward, done, as one of this project's.

python examples/openenv.py
steerl complete --model.path MODEL --environment.factory examples/openenv.py:make "Guess a number from 1 to 20. "

`Adapter` is all that is needed; `NumberEnv` stands for a client (`EchoEnv(base_url=...).sync()`, say), so that this runs
by itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Adapter:
    """Gym's form around a client. Its state is left in `state`, for dumps and for reward functions (`environments`)."""

    def __init__(self, client: Any, action: Callable[[str], Any], text: Callable[[Any], str]):
        self._client, self._action, self._text = client, action, text

    def reset(self, row: dict[str, Any]) -> str:
        return str(row["prompt"]) + self._text(self._client.reset().observation)

    def step(self, completion: str) -> tuple[str, float, bool]:
        result = self._client.step(self._action(completion))
        state = self._client.state
        self.state = vars(state() if callable(state) else state)
        return self._text(result.observation), result.reward or 0.0, result.done


# -- an object of OpenEnv's form ---------------------------------------------------------------------------------------


@dataclass
class Result:
    observation: dict[str, str]
    reward: float | None = None
    done: bool = False


@dataclass
class State:
    episode_id: str = "toy"
    step_count: int = 0


@dataclass
class NumberEnv:
    secret: int = 7
    state: State = field(default_factory=State)

    def reset(self) -> Result:
        return Result({"message": "Your guess: "})

    def step(self, action: dict[str, int]) -> Result:
        self.state.step_count += 1
        if action["number"] == self.secret:
            return Result({"message": "right"}, 1.0, True)
        return Result({"message": " higher: " if action["number"] < self.secret else " lower: "}, 0.0)


def make() -> Adapter:
    def number(text: str) -> dict[str, int]:
        return {"number": int((re.findall(r"\d+", text) or ["0"])[0])}

    return Adapter(NumberEnv(), number, lambda observation: observation["message"])


def main() -> None:
    environment = make()
    print(environment.reset({"prompt": "Guess a number from 1 to 20. "}))
    for said in ("10", "5", "it is 7"):
        print(said, "->", *environment.step(said))
    print("state:", environment.state)


if __name__ == "__main__":
    main()
