"""Triton kernels, one file per op, and the noise they share. Import them as `fastdiff.kernels`."""

if __name__ != "fastdiff.kernels":
    # With the repository root first on sys.path this folder answers to `import kernels`, the name
    # of a package of Hugging Face's. Libraries that look for that must find nothing of use here
    # (they import it to ask for its version), and no second copy of a module may come to be.
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"no {name!r} here: this folder holds fastdiff's kernel sources, write "
            "`import fastdiff.kernels`. If you meant Hugging Face's `kernels`, leave the "
            "repository root or run `python -P`."
        )
