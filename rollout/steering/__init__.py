"""What is added to, taken from or read off activations: where, when, how strongly.

spec  ──bind──>  sites, gates  ──Steering.active──>  engine: in each call, a selection per site, an edit per point
(a user's words)    (on one model)                   state: the rows at work, the calls, where they are edited
"""

from steerl.rollout.model.hooks import unsteered
from steerl.rollout.steering.spec.parse import load_spec
from steerl.rollout.steering.spec.spec import SteeringSpec
from steerl.rollout.steering.steering import Steering

__all__ = ["Steering", "SteeringSpec", "load_spec", "unsteered"]
