"""What is added to, taken from or read off activations: where, when, how strongly.

operations.py   pure functions: what is done to an activation        spec.py (parse, reading, writing)   what a user may write
structure.py    blocks and components of any model                   positions.py                 which real tokens
strengths.py    how strong on which row                              vectors.py, learned.py       files and parameters
sites.py        a site tied to a model                               engine.py, hooks.py          at work in a forward pass
steering.py     Steering: spec + model                               intervene.py                 one-off interventions
extract.py      making vectors                                       explain.py                   what was applied where
"""

from steerl.rollout.model.hooks import unsteered
from steerl.rollout.steering.spec.parse import load_spec
from steerl.rollout.steering.spec.spec import SteeringSpec
from steerl.rollout.steering.steering import Steering

__all__ = ["Steering", "SteeringSpec", "load_spec", "unsteered"]
