"""Models that ship with fastdiff, and examples to train: `fastdiff train`.

digits.py            8x8 handwritten digits: data, shipped weights, a measure of samples
digits_training.py   their training (DDPM)
ncsn.py              a score network on them (NCSN)
heartbeat.py         bits by binomial diffusion
swiss_roll.py        a Gaussian chain that learns its betas
unet.py              the network of the first three
problem.py           what a problem is
trainer.py           the loop that trains any of them, with checkpoints
weights.py           safetensors files
train_command.py     the command line of it
"""
