"""What is measured against what: the cases of `fastdiff bench` and of `pytest benchmarks/`."""
