"""Data: token shards on disk -> the batches of a step.

    shards.py    Dataset: HDF5 shards opened, checked and memory-mapped as one stream of tokens
    scan.py      every token of it is looked at once, before the first step
    sampler.py   Sampler: (seed, step) -> ids of the sequences of that step, the same for any number of ranks
    loader.py    Loader: the ids of my slots -> Batch, prefetched by one thread
"""
