"""Text to batches: bad files are named, order is reproducible, windows are what they should be."""

import pytest
import torch

from fusekit.data import (
    Batches,
    load_corpus,
    python_documentation,
    read_text,
    train_tokenizer,
    validation_batches,
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"abc\0def", "is binary"),
        (b"caf\xe9 au lait", "is not UTF-8"),
    ],
)
def test_an_unusable_file_is_named_with_the_reason(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_text(path)
    assert str(path) in str(error.value)


def test_a_folder_is_not_a_text_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_text(tmp_path)


def test_a_text_too_short_for_the_context_says_how_much_is_needed(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("few words only")
    with pytest.raises(ValueError, match=r"too short.*smaller --context"):
        load_corpus(path, vocab=300, context=64, folder=tmp_path)


def test_default_text_is_english_documentation():
    text = python_documentation()
    assert len(text) > 300_000 and "assert" in text


def test_tokens_decode_to_the_text_and_the_cache_gives_the_same_tokenizer(tmp_path):
    text = "Dies ist ein Text, naïve — 数. " * 50
    first = train_tokenizer(text, 400, tmp_path)
    (cache,) = tmp_path.glob("tokenizer-*.json")
    again = train_tokenizer(text, 400, tmp_path)
    assert first.decode(first.encode(text).ids) == text
    assert again.encode(text).ids == first.encode(text).ids
    cache.write_text("{broken")
    assert train_tokenizer(text, 400, tmp_path).encode(text).ids == first.encode(text).ids


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer("text", 100, tmp_path)


def test_batches_depend_on_position_alone():
    tokens = torch.arange(1000)
    straight = Batches(tokens, batch=3, context=16, seed=7)
    expected = [straight.next() for _ in range(60)]  # 61 windows: three epochs
    jumping = Batches(tokens, batch=3, context=16, seed=7)
    for position in (59, 0, 21, 20, 40):
        jumping.position = position
        for got, want in zip(jumping.next(), expected[position], strict=True):
            assert torch.equal(got, want)


def test_an_epoch_visits_every_window_once_and_targets_are_the_next_token():
    tokens = torch.arange(1 + 10 * 16)
    batches = Batches(tokens, batch=1, context=16, seed=1)
    starts = []
    for _ in range(batches.windows):
        inputs, targets = batches.next()
        assert torch.equal(targets, inputs + 1)
        starts.append(int(inputs[0, 0]))
    assert len({(s - min(starts)) // 16 for s in starts}) == batches.windows
    assert all((s - min(starts)) % 16 == 0 for s in starts)


def test_another_seed_gives_another_order():
    tokens = torch.arange(5000)
    first, second = (Batches(tokens, batch=4, context=16, seed=seed).next()[0] for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("length", [17, 18, 33, 100])
def test_the_shortest_streams_still_give_full_windows(length):
    batches = Batches(torch.arange(length), batch=2, context=16)
    for _ in range(5):
        inputs, targets = batches.next()
        assert inputs.shape == targets.shape == (2, 16)


def test_validation_is_fixed_and_spread_over_the_text():
    tokens = torch.arange(1 + 64 * 16)
    batches = validation_batches(tokens, batch=4, context=16, limit=2)
    assert [inputs.shape for inputs, _ in batches] == [(4, 16), (4, 16)]
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert starts.tolist() == [i * 8 * 16 for i in range(8)]
