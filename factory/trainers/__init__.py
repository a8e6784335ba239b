"""SEAM 4: how the student learns.

A trainer is a function from a `Setup` to a TRL trainer that is ready to run; TRL is called, never subclassed. It runs in a
child process (`python -m factory.trainers.job JOB.json`), after the preflight has seen every row through the student's
own tokenizer and template, and compares the tokens that TRL makes with those.

To add one: such a function, its name in `TRAINERS` of `job.py`, in `METHODS` of `train.py` and in `Train.method`.
"""
