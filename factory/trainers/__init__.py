"""SEAM 4: how the student learns.

A trainer is a function from a `Job` to a TRL trainer that is ready to run; TRL is called, never subclassed. It runs in a
child process (`python -m factory.trainers.job JOB.json`), after the preflight has seen every row through the student's
own tokenizer and template.

To add one: a file with such a function, its name in `TRAINERS` of `job.py` and in `Train.method`.
"""
