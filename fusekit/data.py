"""Text to batches: read, tokenise (byte-pair encoding), split, and batch in a repeatable order."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VALIDATION_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token streams, 1-D int64. `digest` names text and vocabulary, so that a resumed run can check them."""

    train: Tensor
    validation: Tensor
    vocab: int
    digest: str


def python_documentation() -> str:
    """The language reference that ships inside CPython, 0.5 to 0.7 MB of English depending on the version."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | os.PathLike[str] | None) -> str:
    """The text of a file, or CPython's documentation for None.

    Raises:
        ValueError: the file is missing, not a file, empty, not UTF-8, or binary.
    """
    if path is None:
        return python_documentation()
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; --data wants a text file, and without it CPython's documentation is used"
        )
    if not path.is_file():
        raise ValueError(f"{path} is not a file; join the files of a folder into one text file first")
    try:
        raw = path.read_bytes()
    except PermissionError:
        raise ValueError(f"{path} may not be read by this user") from None
    if not raw.strip():
        raise ValueError(f"{path} is empty; training needs at least a few thousand words")
    if b"\0" in raw[: 1 << 20]:
        raise ValueError(f"{path} is binary (it holds zero bytes); --data wants UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is {raw[error.start]:#04x}); convert it "
            f"first, for instance with: iconv -f latin1 -t utf-8"
        ) from None


def train_tokenizer(text: str, vocab: int, folder: Path) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` entries, cached in `folder` by text and size.

    Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            "training on text needs the tokenizers package: pip install 'fusekit-compiler[train]'"
        ) from None
    if vocab < 257:
        raise ValueError(
            f"a byte-level vocabulary holds all 256 bytes and some merges: at least 257, got {vocab}"
        )
    cache = folder / f"tokenizer-{_digest(text, vocab)}.json"
    if cache.exists():
        try:
            return Tokenizer.from_file(str(cache))
        except Exception:  # the library raises bare Exception on a damaged file; it is only a cache
            cache.unlink()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    tokenizer.save(str(temporary))
    temporary.replace(cache)
    return tokenizer


def load_corpus(path: str | os.PathLike[str] | None, *, vocab: int, context: int, folder: Path) -> Corpus:
    """Read, tokenise and split: the first 90 % of the text trains, the rest validates.

    Raises:
        ValueError: see `read_text`; or the text is too short for one window of `context` tokens in each part.
    """
    text = read_text(path)
    tokenizer = train_tokenizer(text, vocab, folder)
    tokens = torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64)
    cut = int(len(tokens) * (1 - VALIDATION_SHARE))
    if len(tokens) - cut <= context:
        least = int((context + 1) / VALIDATION_SHARE) + 1
        raise ValueError(
            f"{path or 'the text'} is too short: {len(tokens)} tokens, and a context of {context} needs "
            f"about {least} so that the validation tenth holds one window; give more text or a "
            f"smaller --context"
        )
    return Corpus(train=tokens[:cut], validation=tokens[cut:], vocab=vocab, digest=_digest(text, vocab))


def _digest(text: str, vocab: int) -> str:
    return hashlib.sha256(f"{vocab}\n{text}".encode()).hexdigest()[:16]


class Batches:
    """Training batches: every epoch visits each window once, in an order drawn from (seed, epoch).

    Windows do not overlap within an epoch; each epoch starts at another offset, so that the cuts move. Batch
    number `position` is a function of the constructor's arguments alone: one integer is the whole state.
    """

    def __init__(self, tokens: Tensor, *, batch: int, context: int, seed: int = 0) -> None:
        """tokens: (N,) int64 with N > context. `next` gives tokens and targets, each (batch, context)."""
        if len(tokens) <= context:
            raise ValueError(f"{len(tokens)} tokens hold no window of {context} and its targets")
        self.tokens, self.batch, self.context, self.seed = tokens, batch, context, seed
        self.windows = max(1, (len(tokens) - context) // context)
        self.position = 0
        self._epoch: tuple[int, Tensor] = (-1, tokens)

    def next(self) -> tuple[Tensor, Tensor]:
        first = self.position * self.batch
        starts = [self._start(*divmod(first + i, self.windows)) for i in range(self.batch)]
        self.position += 1
        rows = torch.stack([self.tokens[s : s + self.context + 1] for s in starts])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _start(self, epoch: int, index: int) -> int:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            slack = len(self.tokens) - self.context - 1 - (self.windows - 1) * self.context
            offset = int(torch.randint(min(slack, self.context - 1) + 1, (), generator=generator))
            self._epoch = (epoch, torch.randperm(self.windows, generator=generator) * self.context + offset)
        return int(self._epoch[1][index])


def validation_batches(
    tokens: Tensor, *, batch: int, context: int, limit: int
) -> list[tuple[Tensor, Tensor]]:
    """At most `limit` batches of windows spread evenly over the validation text; the same on every call."""
    windows = max(1, (len(tokens) - 1) // context)
    count = min(windows, limit * batch)
    starts = [(i * windows // count) * context for i in range(count)]
    rows = torch.stack([tokens[s : s + context + 1] for s in starts])
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(batch)]
