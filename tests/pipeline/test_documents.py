"""From passages of text to documents without copies, in one split each."""

import random
from inspect import cleandoc

from mlx_forget.pipeline import documents, passages
from mlx_forget.pipeline.corpora import SPLITS
from mlx_forget.pipeline.near_copies import SeenText, fingerprints
from mlx_forget.pipeline.passages import english_passages, paragraphs


def test_paragraphs_drop_examples_code_and_the_headings_left_alone() -> None:
    docstring = """Add two numbers.

    Parameters
    ----------
    a : int
        The first.

    For instance::

        c = add(1, 2)

        d = c

    More about it.

    <Tip>

    ```python
    add(1, 2)

    add(3, 4)
    ```

    .. plot::

        import matplotlib

    Examples
    --------

    >>> add(1, 2)
    3

    Notes
    -----
    """
    kept = "\n".join(paragraphs(cleandoc(docstring)))
    assert kept == ("Add two numbers.\nParameters\n----------\na : int\n    The first.\nFor instance::\nMore about it.")


STORY = (
    "The lamp on the harbour wall had not been lit for eleven years when the keeper's daughter came back with a box "
    "of matches, two candles and the firm belief that somebody out there was still waiting for a light."
)


def test_a_copy_is_known_by_its_words_not_by_its_layout() -> None:
    seen = SeenText()
    seen.add(fingerprints([STORY]))
    changed = STORY.upper().replace(" ", "\n  ").replace(",", ";")
    other_word = STORY.replace("eleven", "twelve")
    unrelated = " ".join(sorted(STORY.split()))
    shares = [seen.share(marks) for marks in fingerprints([changed, other_word, unrelated, "too short"])]
    assert shares[0] == 1.0
    assert 0.5 <= shares[1] < 1.0
    assert shares[2] < 0.2
    assert shares[3] == 0.0


def test_marks_do_not_depend_on_the_neighbours() -> None:
    alone = [fingerprints([text])[0].tolist() for text in (STORY, STORY[40:], "one two")]
    together = [marks.tolist() for marks in fingerprints([STORY, STORY[40:], "one two"])]
    assert alone == together


def sources(*texts: str) -> list[documents.English]:
    return [(english_passages(text),) for text in texts]


def test_prose_keeps_one_of_two_copies_and_all_that_is_new() -> None:
    new = "This paragraph is found in one of the two files only, so it stays. " + "And so on. " * 19 + "The end."
    texts = [STORY + "\n\n" + STORY.replace("eleven", "twelve") + "\n\n" + new, STORY + "\n\n" + new[::-1]]
    kept = "".join(text for found in documents.prose(sources(*texts), seen=SeenText()) for text in found)
    assert kept.count("The lamp on the harbour wall") == 1
    assert new in kept


def test_prose_does_not_depend_on_the_order_of_files() -> None:
    texts = [STORY * 2, STORY[::-1] * 2, "Something else altogether that nobody has written before. " * 10]
    orders = [sources(*texts), sources(*reversed(texts))]
    first, second = (list(documents.prose(order, seen=SeenText())) for order in orders)
    assert first == second


def code_passages(*texts: str) -> list[tuple[passages.Passage, ...]]:
    return [(passages.Passage(text, fingerprints([text])[0]),) for text in texts]


def test_code_that_repeats_prose_or_validation_is_left_out() -> None:
    rng = random.Random(1)
    files = [" ".join(f"name_{rng.randrange(10**6)}" for _ in range(60)) for _ in range(60)]
    prose = SeenText()
    prose.add(fingerprints([STORY]))
    clean = documents.code(code_passages(*files, STORY), prose=prose, validation_share=0.3, max_bytes=10**6)
    assert sorted(clean["train"] + clean["validation"]) == sorted(files)
    assert len(clean["validation"]) > 5
    # A training piece that swallows a validation piece, whichever of the two is the larger.
    small, noise = clean["validation"][0], [f"noise_{i}" for i in range(600)]
    for length in (2, 600):
        texts = [" ".join([small, *noise[:length], ending]) for ending in "abcdefgh"]
        results = [
            documents.code(code_passages(*files, whole), prose=prose, validation_share=0.3, max_bytes=10**6) for whole in texts
        ]
        assert not any(small in found["validation"] and set(found["train"]) & set(texts) for found in results)
        assert any(set(found["train"]) & set(texts) for found in results) == (length == 600)


def test_all_of_a_file_goes_to_one_split_and_the_cap_holds() -> None:
    rng = random.Random(2)
    files = [[f"{i} {j} {rng.random()}" for j in range(5)] for i in range(200)]
    splits = documents.split(files, validation_share=0.2, max_bytes=10**6)
    place = {text: split for split in SPLITS for text in splits[split]}
    assert all(len({place[text] for text in texts}) == 1 for texts in files)
    assert 20 < len({text.split()[0] for text in splits["validation"]}) < 60
    capped = documents.split(files, validation_share=0.2, max_bytes=1000)
    assert sum(map(len, capped["train"] + capped["validation"])) < 1100
    assert capped["train"] == splits["train"][: len(capped["train"])]
