"""Models that ship with fastdiff: `digits` (8x8 handwritten digits) and its network, `unet`."""
