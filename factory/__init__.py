"""Black-box distillation: prompts and a teacher in, a clean data set and a small trained student out.

The map, in the order that data flows (a file imports only from files above it):

    rows, errors, knobs     the nouns; the error tree; what recipes are made of
    prompts                 prompt lists in: ids, train/test split, lint
    asking/                 seam 1: what is said
    child, weights          processes that load torch; where local weights come from
    teachers/               seam 2: who answers
    journal, budget, ask    what was paid for; the wall; the only caller of teachers
    generate                stage: draws and beams
    filters/, curate        seam 3: what to keep; stage `filter`
    rubric, judge           stage: scores by a model
    choose, shape, pair     stages: best of N; sample -> training row; samples -> preference pairs
    dataset                 training files and card
    trainers/, train        seam 4: how the student learns; stage `train`
    stats, evaluate         intervals; stage `evaluate`
    report                  one page and one JSON
    recipe                  all stages' knobs as one typed file
    run, pipeline           the run folder; the whole run on one screen
    cli                     verbs
"""

__version__ = "0.1.0"
