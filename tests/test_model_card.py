"""A student's card says how it was made and how it is served, and not where anything lies."""

from factory.model_card import model_card
from factory.train import Train
from factory.weights import Weights

TOLD = {"rows_trained": 1200, "rows_set_aside": {"too_long": 3}, "steps": 75}


def test_a_card_names_what_made_the_student() -> None:
    knobs = Train.model_validate({"method": "sft", "student": "base", "as": "pupil", "args": {"num_train_epochs": 2}})
    card = model_card("zephyr", knobs, Weights(model="HuggingFaceTB/SmolLM2-135M-Instruct"), TOLD)
    assert card.startswith('---\nlibrary_name: transformers\nbase_model: "HuggingFaceTB/SmolLM2-135M-Instruct"\n')
    assert "# pupil\n\nMade by the recipe zephyr: sft from `base`" in card
    assert "on 1,200 rows\n(3 set aside) in 75 steps" in card
    assert "- `num_train_epochs`: 2\n" in card
    assert "    vllm serve PATH/TO/THIS/FOLDER\n" in card


def test_a_card_does_not_say_where_the_base_lies() -> None:
    card = model_card("r", Train(method="sft", student="base"), Weights(model="/home/me/secret/tiny"), TOLD)
    assert "(tiny) on" in card
    assert "secret" not in card
    assert "base_model" not in card
