"""A menu of ways to turn local gradients into agreed parameters: one file each.

`--sync.kind allreduce` is mpilm/sync/allreduce.py. Adding a synchronizer is adding a file.
"""
