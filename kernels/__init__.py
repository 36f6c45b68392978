"""Triton kernels, one file per op, and the noise they share. Import them as `fastdiff.kernels`."""

if __name__ != "fastdiff.kernels":
    # With the repository root first on sys.path this folder answers to `import kernels`. That would
    # hide Hugging Face's package of that name from libraries that look for it, and would give a
    # second copy of every module here.
    raise ImportError(
        "this folder holds fastdiff's kernel sources: write `import fastdiff.kernels`. "
        "If you meant Hugging Face's `kernels`, leave the repository root or run `python -P`."
    )
