"""The README.md that a training run leaves in its checkpoint folder."""

from __future__ import annotations

from typing import Any

from training.recipe import Recipe

_CARD = """# {architecture}, trained with Tuwen

| | |
|---|---|
| data | `{data}`, splits `{train_split}` (training) and `{valid_split}` (validation) |
| epochs | {epoch} of {epochs}, {step} steps of {batch_size} pictures |
| time | {minutes:.1f} minutes |
| loss | {loss} |
| validation recall@10, text to image | {valid_text_to_image_r10:.1%} |
| validation recall@10, image to text | {valid_image_to_text_r10:.1%} |

The recipe:

```json
{recipe}
```
"""


def write_model_card(recipe: Recipe, record: dict[str, Any]) -> str:
    """Markdown: the data, the recipe and the last validation, from one record of metrics.jsonl."""
    return _CARD.format(
        architecture=recipe.model.architecture,
        data=recipe.data.path,
        train_split=recipe.data.train_split,
        valid_split=recipe.data.valid_split,
        epochs=recipe.optim.epochs,
        batch_size=recipe.optim.batch_size,
        minutes=record["elapsed_s"] / 60,
        recipe=recipe.model_dump_json(indent=2),
        **record,
    )
