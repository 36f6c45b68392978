"""What each fused operation means: schema, checks, reference and gradient.

schemas.py     the operations, defined alike for every backend
randn.py step.py chain.py    the reference of each (kernels/ and csrc/ have files of those names)
checks.py      refusals of user input
call.py        memory, layout, gradient and backend of one call
call_loss.py   the same of a loss
held.py        device tables, made once
row.py         rows of a table, NaN where there is none
tables.py      step tables of the forward operations
draw.py        randn, as users call it
forward.py     q_sample and its kin: rows of the step
reverse.py     p_mean_variance, p_sample, ddim_sample: rows of the step
exp.py log.py  the polynomials that learned variance and losses need
"""
