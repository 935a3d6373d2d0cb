"""The harness's own command line with the model `steerl`: python -m steerl.rollout.evaluation run --model steerl ..."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from steerl.rollout.common.errors import UserError
from steerl.rollout.evaluation import harness  # noqa: F401  registers the model

if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as problem:
        sys.stderr.write("\n".join(problem.lines) + "\n")
        raise SystemExit(2) from None
