"""The schedulers of diffusers and the space of their options, run by upstream's code and by ours.

A Case is a scheduler with everything that decides its numbers. `run` is the loop of a pipeline
around a smooth nonlinear model; `reference` is the same loop in float64 on the tables and the
random numbers of another run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

diffusers.logging.set_verbosity_error()  # deprecations and such, by logging

SHAPE = (2, 3, 6, 5)
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP64, FP64), (FP32, BF16)]


@dataclass(frozen=True)
class Case:
    """Arguments of a scheduler's constructor, of set_timesteps and of step; dtypes of the sample
    and of the model output; whether the model also predicts a variance (twice the channels)."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 10
    setting: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    learned: bool = False
    latent: int = 0  # which starting sample

    @property
    def cls(self) -> Any:
        return getattr(diffusers, self.name)

    def __str__(self) -> str:
        parts = [self.name, *(f"{k}={v}" for k, v in {**self.config, **self.options}.items())]
        return " ".join(parts)


# Several schedulers that a user meets, a case each: tests that need not see the whole space.
SEVERAL = [
    Case("DDIMScheduler", dict(clip_sample=False)),
    Case("DDIMScheduler", {}, options=dict(eta=0.5)),
    Case("DDPMScheduler"),
    Case("DDPMScheduler", dict(thresholding=True)),
    Case("EulerDiscreteScheduler"),
    Case("EulerAncestralDiscreteScheduler"),
    Case("HeunDiscreteScheduler"),
    Case("LMSDiscreteScheduler"),
    Case("PNDMScheduler", dict(skip_prk_steps=True)),
    Case("PNDMScheduler"),
    Case("IPNDMScheduler"),
    Case("DPMSolverMultistepScheduler"),
    Case("DPMSolverMultistepScheduler", dict(solver_order=3, use_karras_sigmas=True)),
    Case("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    Case("DPMSolverSinglestepScheduler"),
    Case("DEISMultistepScheduler", dict(solver_order=3)),
    Case("UniPCMultistepScheduler"),
    Case("UniPCMultistepScheduler", dict(solver_order=3)),
    Case("SASolverScheduler"),
    Case("KDPM2DiscreteScheduler"),
    Case("KDPM2AncestralDiscreteScheduler"),
    Case("EDMDPMSolverMultistepScheduler"),
    Case("EDMEulerScheduler", {}, options=dict(s_churn=3.0)),
    Case("LCMScheduler"),
    Case("TCDScheduler"),
    Case("FlowMatchEulerDiscreteScheduler"),
    Case("FlowMatchHeunDiscreteScheduler"),
    Case("CosineDPMSolverMultistepScheduler"),
    Case("LTXEulerAncestralRFScheduler"),
]

# The twelve that matter most in pipelines (use times gain), and whether they draw.
TOP = [
    (Case("FlowMatchEulerDiscreteScheduler"), False),
    (Case("DPMSolverMultistepScheduler"), False),
    (Case("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)), False),
    (Case("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")), True),
    (
        Case("DPMSolverMultistepScheduler",
             dict(use_flow_sigmas=True, prediction_type="flow_prediction")), False,
    ),
    (Case("EulerDiscreteScheduler"), False),
    (Case("DDIMScheduler", dict(clip_sample=False)), False),
    (Case("DDIMScheduler", {}, options=dict(eta=1.0)), True),
    (Case("UniPCMultistepScheduler"), False),
    (
        Case("UniPCMultistepScheduler",
             dict(use_flow_sigmas=True, prediction_type="flow_prediction")), False,
    ),
    (Case("DDPMScheduler"), True),
    (Case("DDPMScheduler", dict(variance_type="learned_range"), learned=True), True),
    (Case("EulerAncestralDiscreteScheduler"), True),
    (Case("LCMScheduler"), True),
    (Case("PNDMScheduler", dict(skip_prk_steps=True)), False),
    (Case("HeunDiscreteScheduler"), False),
    (Case("FlowMatchHeunDiscreteScheduler"), False),
    (Case("DEISMultistepScheduler"), False),
    (Case("DPMSolverSinglestepScheduler"), False),
    (Case("TCDScheduler"), True),
]  # fmt: skip


# The space of options. Every value is one that the class accepts, alone or with others; what
# upstream refuses is drawn too, since pairs are not checked here.

_BETAS = dict(
    beta_schedule=["linear", "scaled_linear", "squaredcos_cap_v2"],
    beta_start=[0.00085, 0.0001], beta_end=[0.012, 0.02], num_train_timesteps=[1000, 250],
)  # fmt: skip
_SPACING = dict(timestep_spacing=["leading", "trailing", "linspace"], steps_offset=[0, 1])
_SIGMAS = dict(use_karras_sigmas=[True], use_exponential_sigmas=[True], use_beta_sigmas=[True])
_FLOW = dict(use_flow_sigmas=[True], flow_shift=[1.0, 3.0])
_DYNAMIC = dict(use_dynamic_shifting=[True], time_shift_type=["exponential", "linear"])
_PREDICTION = dict(prediction_type=["epsilon", "sample", "v_prediction"])
_PREDICTION_FLOW = dict(prediction_type=["epsilon", "sample", "v_prediction", "flow_prediction"])
_THRESHOLD = dict(
    thresholding=[True], dynamic_thresholding_ratio=[0.995, 0.9], sample_max_value=[1.0, 1.5]
)
_CLIP = dict(clip_sample=[True, False], clip_sample_range=[1.0, 2.0])
_CLASSIC = {**_BETAS, **_SPACING, **_PREDICTION, "rescale_betas_zero_snr": [True]}
_SHIFT = dict(shift=[1.0, 3.0], num_train_timesteps=[1000, 100])
_FLOW_MATCH = {
    **_SHIFT, **_SIGMAS, **_DYNAMIC, "invert_sigmas": [True], "shift_terminal": [0.1]
}  # fmt: skip
_CHURN = dict(s_churn=[1.0, 20.0], s_tmin=[0.1], s_tmax=[8.0], s_noise=[1.0, 1.01])
_ETA = dict(eta=[0.0, 0.3, 1.0], use_clipped_model_output=[True])
_MU = dict(mu=[0.5, 1.15])
_DPM = dict(
    solver_order=[1, 2, 3], solver_type=["midpoint", "heun"], lower_order_final=[True, False],
    final_sigmas_type=["zero", "sigma_min"], euler_at_final=[True],
)  # fmt: skip
_ALGORITHMS = ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
_LAMBDA = dict(lambda_min_clipped=[-5.1], variance_type=["learned_range"])
_EDM = dict(
    sigma_schedule=["karras", "exponential"], sigma_min=[0.002, 0.3], sigma_max=[80.0, 10.0],
    sigma_data=[0.5, 1.0], rho=[7.0, 5.0], prediction_type=["epsilon", "v_prediction"],
    final_sigmas_type=["zero", "sigma_min"],
)  # fmt: skip


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in names}


def _flow_sigmas(steps: int) -> list[float]:
    return np.linspace(1.0, 1.0 / steps, steps).tolist()


def _edm_sigmas(steps: int) -> list[float]:
    return np.geomspace(14.0, 0.03, steps).tolist()


def _descending(steps: int) -> list[int]:
    return np.linspace(240, 3, steps).round().astype(int).tolist()


# name: (constructor, set_timesteps, step). Callables take the number of steps.
SPACE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "DDIMScheduler": (
        {**_CLASSIC, **_CLIP, **_THRESHOLD, "set_alpha_to_one": [True, False]}, {}, _ETA,
    ),
    "DDIMParallelScheduler": (
        {**_CLASSIC, **_CLIP, **_THRESHOLD, "set_alpha_to_one": [True, False]}, {}, _ETA,
    ),
    "CogVideoXDDIMScheduler": (
        {**_CLASSIC, "snr_shift_scale": [1.0, 3.0], "set_alpha_to_one": [True, False]}, {}, {},
    ),
    "DDIMInverseScheduler": (
        {**_CLASSIC, **_CLIP, "set_alpha_to_one": [True, False]}, {}, {},
    ),
    "DDPMScheduler": (
        {**_CLASSIC, **_CLIP, **_THRESHOLD, "variance_type": [
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned",
            "learned_range",
        ]}, dict(timesteps=[_descending]), {},
    ),
    "DDPMParallelScheduler": (
        {**_CLASSIC, **_CLIP, **_THRESHOLD,
         "variance_type": ["fixed_small", "fixed_large", "learned_range"]}, {}, {},
    ),
    "UnCLIPScheduler": (
        {**_CLIP, "variance_type": ["fixed_small_log", "learned_range"],
         "prediction_type": ["epsilon", "sample"]}, {}, {},
    ),
    "EulerDiscreteScheduler": (
        {**_CLASSIC, **_SIGMAS, "final_sigmas_type": ["zero", "sigma_min"],
         "timestep_type": ["discrete", "continuous"],
         "interpolation_type": ["linear", "log_linear"]},
        dict(sigmas=[_edm_sigmas], timesteps=[_descending]), _CHURN,
    ),
    "EulerAncestralDiscreteScheduler": (_CLASSIC, {}, {}),
    "HeunDiscreteScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_SIGMAS, **_CLIP},
        dict(timesteps=[_descending]), {},
    ),
    "KDPM2DiscreteScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_SIGMAS}, {}, {},
    ),
    "KDPM2AncestralDiscreteScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_SIGMAS}, {}, {},
    ),
    "LMSDiscreteScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_SIGMAS}, {},
        dict(order=[1, 2, 3, 4]),
    ),
    "PNDMScheduler": (
        {**_BETAS, **_SPACING, "skip_prk_steps": [True, False], "set_alpha_to_one": [True],
         "prediction_type": ["epsilon", "v_prediction"]}, {}, {},
    ),
    "IPNDMScheduler": (dict(num_train_timesteps=[1000, 250]), {}, {}),
    "DPMSolverMultistepScheduler": (
        {**_CLASSIC, **_PREDICTION_FLOW, **_SIGMAS, "use_lu_lambdas": [True], **_FLOW, **_DPM,
         **_THRESHOLD, **_LAMBDA, "algorithm_type": _ALGORITHMS, **_DYNAMIC},
        {**_MU, "timesteps": [_descending]}, {},
    ),
    "DPMSolverMultistepInverseScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_PREDICTION_FLOW, **_SIGMAS, **_FLOW,
         **_without(_DPM, "final_sigmas_type"), **_THRESHOLD, **_LAMBDA,
         "algorithm_type": _ALGORITHMS}, {}, {},
    ),
    "DPMSolverSinglestepScheduler": (
        {**_BETAS, **_PREDICTION_FLOW, **_SIGMAS, **_FLOW, **_without(_DPM, "euler_at_final"),
         **_THRESHOLD, **_LAMBDA, "algorithm_type": _ALGORITHMS[:3], **_DYNAMIC},
        {**_MU, "timesteps": [_descending]}, {},
    ),
    "DEISMultistepScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_PREDICTION_FLOW, **_SIGMAS, **_FLOW,
         **_THRESHOLD, "solver_order": [1, 2, 3], "lower_order_final": [True, False],
         **_DYNAMIC}, _MU, {},
    ),
    "UniPCMultistepScheduler": (
        {**_CLASSIC, **_PREDICTION_FLOW, **_SIGMAS, **_FLOW, **_THRESHOLD,
         "solver_order": [1, 2, 3, 4], "predict_x0": [True, False], "solver_type": ["bh1", "bh2"],
         "lower_order_final": [True, False], "disable_corrector": [[0], [0, 1, 2]],
         "final_sigmas_type": ["zero", "sigma_min"], **_DYNAMIC, "shift_terminal": [0.1]},
        {**_MU, "sigmas": [_flow_sigmas]}, {},
    ),
    "SASolverScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_PREDICTION_FLOW, **_SIGMAS, **_FLOW,
         **_THRESHOLD, "predictor_order": [1, 2, 3], "corrector_order": [1, 2, 3],
         "algorithm_type": ["data_prediction", "noise_prediction"],
         "lower_order_final": [True, False]}, {}, {},
    ),
    "EDMEulerScheduler": (_EDM, {}, _CHURN),
    "EDMDPMSolverMultistepScheduler": (
        {**_EDM, **_DPM, **_THRESHOLD, "algorithm_type": _ALGORITHMS[:2]}, {}, {},
    ),
    "CosineDPMSolverMultistepScheduler": (
        {**_without(_DPM, "solver_order"), "solver_order": [1, 2], "sigma_max": [500, 80],
         "sigma_schedule": ["exponential", "karras"],
         "prediction_type": ["epsilon", "v_prediction"]}, {}, {},
    ),
    "DPMSolverSDEScheduler": (
        {**_without(_CLASSIC, "rescale_betas_zero_snr"), **_SIGMAS,
         "prediction_type": ["epsilon", "v_prediction"], "noise_sampler_seed": [3]}, {},
        dict(s_noise=[1.0, 1.01]),
    ),
    "LCMScheduler": (
        {**_without(_BETAS, "num_train_timesteps"), **_PREDICTION, **_CLIP, **_THRESHOLD,
         "rescale_betas_zero_snr": [True], "timestep_scaling": [10.0, 5.0]}, {}, {},
    ),
    "TCDScheduler": (
        {**_without(_BETAS, "num_train_timesteps"), **_PREDICTION, **_CLIP, **_THRESHOLD,
         "rescale_betas_zero_snr": [True]}, {}, dict(eta=[0.0, 0.3, 1.0]),
    ),
    "CMStochasticIterativeScheduler": (
        dict(clip_denoised=[True, False], s_noise=[1.0, 1.01], sigma_data=[0.5, 1.0]), {}, {},
    ),
    "SCMScheduler": (
        dict(sigma_data=[0.5, 1.0], prediction_type=["trigflow"]),
        dict(intermediate_timesteps=[1.3, None]), {},
    ),
    "FlowMatchEulerDiscreteScheduler": (
        {**_FLOW_MATCH, "stochastic_sampling": [True]}, {**_MU, "sigmas": [_flow_sigmas]}, {},
    ),
    "FlowMatchHeunDiscreteScheduler": (_SHIFT, {}, _CHURN),
    "FlowMatchLCMScheduler": (_FLOW_MATCH, {**_MU, "sigmas": [_flow_sigmas]}, {}),
    "FlowMapEulerDiscreteScheduler": (_SHIFT, dict(sigmas=[_flow_sigmas]), {}),
    "LTXEulerAncestralRFScheduler": (
        dict(eta=[0.0, 0.5, 1.0], s_noise=[1.0, 0.9]), dict(sigmas=[_flow_sigmas]), {},
    ),
    "MiniMaxH3Scheduler": (dict(shift=[12.0, 1.0]), {}, {}),
}  # fmt: skip
SPACE = {name: space for name, space in SPACE.items() if hasattr(diffusers, name)}

_SIGMA_KINDS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_flow_sigmas",
)  # fmt: skip


@st.composite
def cases(draw: Any, names: list[str] | None = None, dtypes: Any = None) -> Case:
    """Any case of the space: about half of the options at their defaults, at most one kind of
    sigmas (several are refused by the constructor, which is upstream's own)."""
    name = draw(st.sampled_from(sorted(names or SPACE)))
    steps = draw(st.integers(1, 40))
    rare = {"thresholding", "rescale_betas_zero_snr", "timesteps", "sigmas", "variance_type"}

    def some(space: dict[str, Any]) -> dict[str, Any]:
        kind = draw(st.sampled_from([None, *(k for k in _SIGMA_KINDS if k in space)]))
        chosen = {}
        for option, values in space.items():
            if option in _SIGMA_KINDS:
                if option == kind:
                    chosen[option] = True
                continue
            unset = 3 if option in rare else 1
            if draw(st.integers(0, unset)) == 0:
                value = draw(st.sampled_from(values))
                chosen[option] = value(steps) if callable(value) else value
        return chosen

    config, setting, options = (some(space) for space in SPACE[name])
    if config.get("use_flow_sigmas") and draw(st.booleans()):
        config["prediction_type"] = "flow_prediction"
    if config.get("use_dynamic_shifting"):
        setting.setdefault("mu", 0.8)
    elif "FlowMatch" not in name and name != "UniPCMultistepScheduler":
        setting.pop("mu", None)
    if name == "SCMScheduler":
        steps = 2 if setting.get("intermediate_timesteps", 1.3) else steps
    learned = config.get("variance_type") in ("learned", "learned_range")
    pair = draw(st.sampled_from(dtypes or DTYPES))
    return Case(name, config, steps, setting, options, pair, learned)


# Running a case.


@dataclass
class Outcome:
    """What came of a run.

    results: of the last step, as a tuple. kinds: what every step returned. error: what was raised,
    at which step (-1: before the first).
    """

    scheduler: Any = None
    results: tuple[Any, ...] = ()
    kinds: list[Any] = field(default_factory=list)
    error: Exception | None = None
    error_at: int | None = None
    states: tuple[Tensor, ...] = ()
    calls: int = 0

    @property
    def x(self) -> Tensor:
        return self.results[0]


def model(x: Tensor, t: Any, learned: bool = False) -> Tensor:
    """Smooth and nonlinear, computed in float64, of the dtype of x."""
    wide = x.double()
    out = torch.tanh(wide * 0.7 + 0.1 * torch.sin(2 * wide.roll(1, -1)) + float(t) / 3000)
    if learned:
        out = torch.cat([out, torch.cos(3 * wide)], 1)
    return out.to(x.dtype)


def start(scheduler: Any, dtype: torch.dtype, latent: int = 0) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(latent), dtype=FP64)
    return (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)


def set_timesteps(scheduler: Any, case: Case) -> None:
    """As pipelines do: custom timesteps or sigmas stand instead of a number of steps."""
    given = "timesteps" in case.setting or "sigmas" in case.setting
    scheduler.set_timesteps(*([] if given else [case.steps]), **case.setting)


def takes(scheduler: Any, name: str) -> bool:
    return name in inspect.signature(scheduler.step).parameters


def run(case: Case, make: Any, *, reuse: bool = False, seed: int = 7) -> Outcome:
    """The loop of a pipeline with make(**config); every other step returns upstream's class.

    reuse: every model output is written into the same buffer, as a captured CUDA graph does.
    """
    outcome = Outcome()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(3)
    with warnings.catch_warnings(), np.errstate(all="ignore"), torch.no_grad():
        warnings.simplefilter("ignore")  # upstream's own: deprecations, NumPy's of log(0)
        try:
            outcome.scheduler = scheduler = make(**case.config)
            set_timesteps(scheduler, case)
        except Exception as error:
            outcome.error, outcome.error_at = error, -1
            return outcome
        x = start(scheduler, case.dtypes[0], case.latent)
        options = dict(case.options)
        if takes(scheduler, "generator"):
            options["generator"] = generator
        buffer = None
        timesteps = list(scheduler.timesteps)
        if case.name == "SCMScheduler":
            timesteps.pop()  # the end of the last step
        for i, t in enumerate(timesteps):
            try:
                seen = _scaled(scheduler, x, t)
                output = model(seen, t, case.learned).to(case.dtypes[1])
                if reuse:
                    buffer = torch.empty_like(output) if buffer is None else buffer
                    output = buffer.copy_(output)
                result = scheduler.step(output, t, x, return_dict=bool(i % 2), **options)
            except Exception as error:
                outcome.error, outcome.error_at = error, i
                return outcome
            outcome.kinds.append(_kind(result))
            outcome.results = _tuple(result)
            outcome.calls += 1
            x = outcome.x
    outcome.states = (generator.get_state(), torch.get_rng_state())
    return outcome


def _scaled(scheduler: Any, x: Tensor, t: Any) -> Tensor:
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else tuple(v for v in result.values())


def _kind(result: Any) -> Any:
    if type(result) is tuple:
        return tuple(v.dtype for v in result)
    return type(result), {k: None if v is None else v.dtype for k, v in result.items()}


class Recorded(TorchFunctionMode):
    """Keeps what torch.randn returns; or returns what another one kept."""

    def __init__(self, source: Recorded | None = None) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.left: Iterator[Tensor] | None = None if source is None else iter(source.kept)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn and func is not torch.randn_like:
            return func(*args, **kwargs)
        if self.left is not None:
            return next(self.left).double()
        self.kept.append(func(*args, **kwargs))
        return self.kept[-1]


@contextlib.contextmanager
def in_float64(cls: type) -> Iterator[None]:
    """Within: images that the scheduler casts to float32 become float64."""
    module = sys.modules[cls.__module__]

    class Widened:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, "float64" if name == "float32" else name)

    saved = vars(module)["torch"]
    try:
        vars(module)["torch"] = Widened()
        yield
    finally:
        vars(module)["torch"] = saved


@contextlib.contextmanager
def trees(cls: type, source: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Within: Brownian trees keep what they return; or return what others kept."""
    module = sys.modules[cls.__module__]
    kept: list[Tensor] = []
    original = vars(module).get("BrownianTreeNoiseSampler")
    if original is None:
        yield kept
        return
    left = None if source is None else iter(source)

    class Tree(original):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any) -> Tensor:
            if left is not None:
                return next(left).double()
            kept.append(super().__call__(*args))
            return kept[-1]

    try:
        vars(module)["BrownianTreeNoiseSampler"] = Tree
        yield kept
    finally:
        vars(module)["BrownianTreeNoiseSampler"] = original


def upstream_and_reference(case: Case) -> tuple[Outcome, Outcome]:
    """Upstream's run in the case's dtypes, and in float64 on the same tables and noise."""
    has_tree = "BrownianTreeNoiseSampler" in vars(sys.modules[case.cls.__module__])
    recorded = Recorded()
    with trees(case.cls) as kept, contextlib.nullcontext() if has_tree else recorded:
        upstream = run(case, case.cls)
    wide = dataclasses.replace(case, dtypes=(FP64, FP64))

    class Prepared:
        """Tables as upstream makes them; only steps are widened."""

        def __init__(self, scheduler: Any) -> None:
            self._scheduler = scheduler

        def __getattr__(self, name: str) -> Any:
            return getattr(self._scheduler, name)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            with in_float64(case.cls):
                return self._scheduler.step(*args, **kwargs)

    def make(**config: Any) -> Any:
        prepared = Prepared(case.cls(**config))
        prepared.step = _signed(prepared.step, prepared._scheduler.step)  # type: ignore[method-assign]
        return prepared

    with trees(case.cls, kept), contextlib.nullcontext() if has_tree else Recorded(recorded):
        reference = run(wide, make)
    return upstream, reference


def _signed(function: Any, like: Any) -> Any:
    def step(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    step.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return step


def rms(value: Tensor) -> float:
    return float(value.double().pow(2).mean().sqrt())


def plan_of(scheduler: Any) -> Any:
    """The plan that an accelerated scheduler runs; None when it runs upstream's own step."""
    stepper = vars(scheduler).get("_fastdiff_stepper")
    return None if stepper is None or stepper.traced is None else stepper.traced.plan


def reason_of(scheduler: Any) -> str:
    """Why an accelerated scheduler runs upstream's own step."""
    stepper = vars(scheduler).get("_fastdiff_stepper")
    if stepper is None:
        return "no step was made"
    return stepper.only_upstream or ("" if stepper.traced is None else stepper.traced.reason)


def runs_past_the_end(scheduler: Any) -> bool:
    """Whether the first timestep is there twice: upstream begins at its second place, so that a
    loop over all timesteps ends behind the last."""
    values = scheduler.timesteps.tolist()
    return len(values) > 1 and values.count(values[0]) > 1
