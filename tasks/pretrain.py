"""The data folder's `corpus` as tasks `corpus_span_corruption` and `corpus_prefix_lm`.

They train on the books and Shakespeare's plays, are validated and tested on WikiText-2. Importing
this module registers them; the text is read when a task is. For other text use `span_corruption`
and `prefix_lm`.
"""

from mtl_jax.errors import UserError
from mtl_jax.tasks.data_folder import data_file
from mtl_jax.tasks.prefix_lm import add_prefix_lm_task
from mtl_jax.tasks.span_corruption import add_span_corruption_task
from mtl_jax.tasks.t5_vocabulary import t5_vocabulary

TASK = "corpus_span_corruption"
PREFIX_LM_TASK = "corpus_prefix_lm"


def register() -> None:
    """Registers the tasks.

    Raises:
        UserError: no data folder, or a part of the corpus is missing.
    """
    books = data_file("corpus", "books")
    plays = data_file("corpus", "tinyshakespeare.txt.gz")
    found = sorted(books.glob("*.txt.gz"))
    if not found:
        raise UserError(f"{books} holds no *.txt.gz files.")
    files = {
        "train": [*found, plays],
        "validation": [data_file("corpus", "wikitext-2", "valid.txt.gz")],
        "test": [data_file("corpus", "wikitext-2", "test.txt.gz")],
    }
    add_span_corruption_task(
        TASK, files, t5_vocabulary(), citation="Raffel et al. 2020, section 3.1.4"
    )
    add_prefix_lm_task(
        PREFIX_LM_TASK, files, t5_vocabulary(), citation="Raffel et al. 2020, section 3.3.1"
    )


register()
