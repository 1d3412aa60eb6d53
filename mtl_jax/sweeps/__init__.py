"""Zero-shot sweeps: checkpoints x tasks x prompts x shots as cells on disk.

`checkpoints` finds and loads models, `cells` says what a cell is and asks, `scoring` turns what the
model said into results, `claims` divides the work among processes, `running` does it, `estimate`
says beforehand how long it takes. sweep_files.py is the format on disk.
"""
