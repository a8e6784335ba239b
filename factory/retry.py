"""The one retry policy: what is sent again, and how often."""

import tenacity

from factory.rows import Failure, Outcome, Request
from factory.teachers.failures import ACTIONS, RULES

_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=30)


def pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: what the server asks for, and a random share of a growing pause."""
    outcome = state.outcome.result() if state.outcome else None
    asked = outcome.retry_after if isinstance(outcome, Failure) else None
    return (asked or 0.0) + _backoff(state)


def again(request: Request, outcome: Outcome | None) -> bool:
    """Whether to send once more. The same seed, or greedy decoding, would give the same empty answer again."""
    if not isinstance(outcome, Failure) or ACTIONS[outcome.reason] != "retry":
        return False
    repeatable = request.seed is not None or request.sampling.temperature == 0 or request.sampling.beam is not None
    return not (outcome.reason == "empty" and repeatable)


def tries(limit: int, outcome: Outcome | None) -> int:
    """How often a failure may come before its request is set aside: `max_attempts`, unless its rule says less."""
    few = RULES[outcome.reason].tries if isinstance(outcome, Failure) else None
    return min(limit, few or limit)


def in_another_batch(limit: int, request: Request, failure: Failure, failed: int) -> bool:
    """Whether a request that has failed in so many batches goes into one more; what stopped a run is mended by now.

    One that asked for several answers and was refused for it goes once more, each draw by itself.
    """
    action = ACTIONS[failure.reason]
    if action == "adapt":
        return request.n > 1 and failed == 1
    return action == "stop" or (failed < tries(limit, failure) and (action == "wait" or again(request, failure)))
