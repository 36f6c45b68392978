"""The self-test: does every backend compute what the definition says, on this machine?

fastdiff selftest          on the host, seconds
fastdiff selftest --gpu    everything worth running on a GPU, in ten minutes
"""
