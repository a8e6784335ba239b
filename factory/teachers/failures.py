"""stand-in until the wire branch lands"""

from typing import Literal

from factory.errors import AuthError, BudgetError, FactoryError, IdentityError
from factory.rows import Reason

ACTIONS: dict[Reason, Literal["retry", "wait", "adapt", "set aside", "stop"]] = {
    "auth": "stop",
    "bad_json": "retry",
    "bad_request": "set aside",
    "budget": "stop",
    "context_overflow": "set aside",
    "empty": "retry",
    "engine_died": "retry",
    "filtered_output": "set aside",
    "missing_choice": "retry",
    "model_not_found": "stop",
    "no_stored_answer": "set aside",
    "not_answered": "retry",
    "outage": "retry",
    "quota": "stop",
    "rate_limited": "wait",
    "reasoning_only": "set aside",
    "refused_input": "set aside",
    "server_error": "retry",
    "timeout": "retry",
    "too_large": "set aside",
    "tool_calls": "set aside",
    "transport": "retry",
    "unknown_finish": "set aside",
    "wrong_model": "stop",
}
STOPS: dict[Reason, type[FactoryError]] = {
    "auth": AuthError,
    "quota": BudgetError,
    "model_not_found": IdentityError,
    "wrong_model": IdentityError,
}
MAYBE_BILLED = {"timeout", "transport", "server_error", "bad_json", "missing_choice", "empty", "filtered_output"}
