"""`factory push`: a run's data set to a hub. Private, unless it is said otherwise; never without its teachers' terms.

The key is the hub library's own affair (HF_TOKEN, or its login): it is neither read nor written here. What is sent is
the folder `dataset/` and nothing else of the run.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from factory.errors import AuthError, FactoryError, OutageError, RecipeError
from factory.evaluate import Evaluate
from factory.forms import header
from factory.generate import Generate
from factory.recipe import Recipe, load
from factory.teachers.reference import Reference

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class _Run(msgspec.Struct):
    """Of a run's manifest, what decides whether its data set may go out."""

    status: str
    rows: dict[str, dict[str, int]] = {}


def push(run: Path, to: str, public: bool = False, dry: bool = False) -> Iterator[str]:
    """Send the data set, and tell people how in lines. RecipeError where it must not go out; nothing is sent then."""
    if not ID.fullmatch(to):
        raise RecipeError(f"--to {to!r}: write USER/NAME, the data set's id on the hub")
    recipe, data = load(run / "recipe.yaml"), run / "dataset"
    _may_go_out(run, recipe)
    yield f"data set {to}, {'public: everybody can see it' if public else 'private'}"
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        yield f"  {path.relative_to(data)}  {path.stat().st_size} bytes"
    for one in recipe.prompts:
        if one.licence is None:
            yield f"warning: prompts {one.title}: the licence is not stated; `licence:` on the list puts it into the card"
    if dry:
        yield "nothing was sent: --dry-run"
    else:
        yield f"sent: {_send(data, to, public)}"


def _may_go_out(run: Path, recipe: Recipe) -> None:
    header(run / "dataset")
    try:
        told = msgspec.json.decode((run / "manifest.json").read_bytes(), type=_Run)
    except (OSError, ValueError) as e:
        raise RecipeError(f"{run / 'manifest.json'} cannot be read ({e}); run the recipe again") from None
    if told.status != "done":
        raise RecipeError(f"{run} is {told.status}, so its data set may be of an earlier start; let the run end first")
    if not any(count for splits in told.rows.values() for count in splits.values()):
        raise RecipeError(f"{run}: the data set has no rows; `factory show` tells where they went")
    if silent := _without_terms(recipe):
        named = ", ".join(f"models.{name}" for name in silent)
        raise RecipeError(
            f"the terms of {named} are not stated: say in the recipe what the answers may be used for "
            f"(models.{silent[0]}.terms) and run it again, which asks nothing anew; nothing was sent"
        )


def _without_terms(recipe: Recipe) -> list[str]:
    """The models whose answers are in the data, and whose `terms` nobody has stated. Ground truth is the prompt list's."""
    named: list[str] = []
    for stage in recipe.stages:
        if isinstance(stage, Generate):
            named += [*stage.models, *([stage.fallback] if stage.fallback else [])]
        elif isinstance(stage, Evaluate) and stage.teacher:
            named.append(stage.teacher)
    entries = {name: recipe.models[name] for name in named if name in recipe.models}
    return [name for name, e in entries.items() if not isinstance(e, Reference) and not (e.terms or "").strip()]


def _send(data: Path, to: str, public: bool) -> str:
    """Create the repository if need be and send the files in one commit; gives its address."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    except ImportError:
        raise RecipeError("push needs huggingface_hub: pip install 'distillation-factory[hub]'") from None

    hub = HfApi()
    try:
        hub.create_repo(to, repo_type="dataset", private=not public, exist_ok=True)
        if not public and hub.dataset_info(to).private is False:  # one that was there before stays as it is
            raise RecipeError(f"{to} is public; say --public, or name another data set. Nothing was sent")
        done = hub.upload_folder(repo_id=to, repo_type="dataset", folder_path=data, commit_message="Data set and card")
        return str(done.commit_url)
    except LocalTokenNotFoundError:
        raise AuthError("the hub wants a key: set HF_TOKEN, or run `hf auth login`") from None
    except HfHubHTTPError as e:
        raise _refused(to, e.response.status_code) from None
    except FactoryError:
        raise
    except Exception as e:  # of whichever library the hub's uses for HTTP: that has changed before
        raise OutageError(f"{to}: the hub cannot be reached ({type(e).__name__}); try again later") from None


def _refused(to: str, status: int) -> FactoryError:
    """What the hub's status means."""
    if status in (401, 403):
        return AuthError(f"{to}: the hub refuses the key ({status}): set HF_TOKEN to one that may write there")
    if status == 429 or status >= 500:
        return OutageError(f"{to}: the hub answers {status}; try again later")
    return RecipeError(f"{to}: the hub refuses it ({status}); is the name right?")
