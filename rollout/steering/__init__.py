"""What is added to, taken from or read off activations: where, when, how strongly.

spec  ──bind──>  sites, gates  ──Steering.active──>  engine: in each call, a selection per site, an edit per point
(a user's words)    (on one model)                   state: the rows at work, the calls, where they are edited
"""

from typing import TYPE_CHECKING

from steerl.rollout.common.front import front

if TYPE_CHECKING:  # for editors and type checkers
    from steerl.rollout.steering.spec.parse import load_spec as load_spec
    from steerl.rollout.steering.spec.spec import SteeringSpec as SteeringSpec
    from steerl.rollout.steering.steering import Steering as Steering
    from steerl.rollout.steering.steering import unsteered as unsteered

__getattr__, __all__ = front(
    __name__,
    {
        "steering": ("Steering", "unsteered"),
        "spec.spec": ("SteeringSpec",),
        "spec.parse": ("load_spec",),
    },
)
