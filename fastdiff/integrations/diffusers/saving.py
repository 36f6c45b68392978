"""Runs that are copied, pickled or left in the middle: what goes along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdiff.run import Run

if TYPE_CHECKING:
    from fastdiff.integrations.diffusers.stepping import Stepper

__all__ = ["hand_on", "left", "put_away", "resume", "saved"]


def saved(stepper: Stepper) -> dict[str, Any]:
    """What a copy of the scheduler needs to go on: no more than tensors and numbers."""
    saved: dict[str, Any] = {"only_upstream": stepper.only_upstream}
    run, origin = stepper.run, stepper.origin
    if run is not None and origin is not None:
        states = [run.x, *[h if h is None else h.clone() for h in run.history]]
        saved["run"] = (
            origin.attributes, list(origin.foreign), stepper.begin, stepper.settings,
            stepper.doubled, stepper.kinds, run.index, states,
        )  # fmt: skip
    return saved


def resume(stepper: Stepper, saved: dict[str, Any]) -> None:
    """Goes on where the stepper stood that `saved` is from."""
    stepper.only_upstream = saved["only_upstream"]
    stepper.elsewhere = "elsewhere" in saved
    if "run" in saved:
        attributes, foreign, begin, settings, doubled, kinds, index, states = saved["run"]
        stepper.places.foreign[:] = foreign
        stepper.take_origin(attributes)
        plan = stepper.take_plan(begin, settings, doubled).plan
        assert plan is not None
        run = stepper.run = Run(plan, states[0], **kinds)
        stepper.kinds, run.index, run._states = kinds, index, states


def left(stepper: Stepper) -> dict[str, Any]:
    """What `resume` needs in a scheduler that does not go on with this run."""
    saved: dict[str, Any] = {"only_upstream": stepper.only_upstream}
    run = stepper.run
    if run is not None and run.index and not run.done and run.plan.states > 1:
        saved["elsewhere"] = True
    return saved


def put_away(stepper: Stepper) -> dict[str, Any]:
    """Attributes that the run serves from its history, as they were before it."""
    if stepper.traced is None or stepper.origin is None:
        return {}
    return {name: stepper.origin.attributes.get(name) for name in stepper.traced.images}


def hand_on(stepper: Stepper, other: Stepper) -> None:
    """Lets a resumed copy take the sample that this stepper returned for its own."""
    other.last, other.version = stepper.last, stepper.version
