"""What each fused operation means: schema, checks, reference and gradient.

schemas.py     the operations, defined alike for every backend
randn.py step.py chain.py    the reference of each (kernels/ and csrc/ have files of those names)
call.py        memory, layout, gradient and backend of one call
forward.py     q_sample and its kin: rows of the step
reverse.py     p_mean_variance, p_sample, ddim_sample: rows of the step
"""
