"""Tracing: a sampler's own code, run once on linear forms, becomes a plan.

linear_form  what stands for an image
record       a recording: calls, draws, clamps and the forms between them
functionals  what spans what, and what is rounding
realize      from a recording to the plan with the least history
intercept    random functions of torch, for a tracing thread only
trace        schedulers and sampling functions of other projects
"""

from .linear_form import LinearForm, NotAffineError
from .record import Recorder
from .trace import trace

__all__ = ["LinearForm", "NotAffineError", "Recorder", "trace"]
