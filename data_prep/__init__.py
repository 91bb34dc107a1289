"""data_prep: raw text -> HDF5 token shards.

    python -m data_prep.tokenizer texts/ --vocab_size 32000 --to tokenizer.json
    mpirun -np 8 python -m data_prep.encode texts/ --tokenizer tokenizer.json --to tokens --validation 0.01
    python -m data_prep.verify tokens
"""
