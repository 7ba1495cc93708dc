"""Builds the static automaton of SAM decoding: everything a target has said before, in one memory-mapped file.

    python scripts/build_sam.py runs/viskip_tiny --target tiny_llava --out runs/viskip_tiny/sam.safetensors

Drafting from it costs no training and no device memory. It pays where answers resemble those of the corpus, so give it
what the target itself wrote: the answers that a training run regenerated, or logged conversations.

what is read (files and folders, any number of them)
  a run folder of train/distill.py   its regenerated answers (answers/*/answers.jsonl, or what there is of them)
  *.jsonl, *.json                    one record a line, or a list of records; of each record the first of these:
                                       output_ids, tokens, input_ids   token ids of this target
                                       answers                         texts of replies
                                       conversations                   LLaVA's or ShareGPT's: its replies
                                       messages                        OpenAI's or Hugging Face's: its replies
                                       text                            one text
                                     a record may also be a text or a list of ids by itself
  *.txt                              texts with an empty line between them

  The requests.jsonl of an evaluation is such a file; do not draft for the prompts that it was measured on.
  Each text or reply is a document: no match and no draft crosses two of them. Replies end in the stop token, texts do
  not. Records that cannot be used are listed beside the result, in OUT.quarantine.jsonl.

what it takes
  about 0.5 KB of memory and 10 microseconds a token while building, and 40 bytes a token on disk.

The file works for every target with the same vocabulary and is refused by others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mmspec.arguments import Parser, add_bad_share, command
from mmspec.drafters._automaton import Automaton, freeze, save
from mmspec.records import Quarantine, RecordError
from mmspec.targets import Vocabulary, load_vocabulary
from mmspec.types import InputError

PROGRAM = "build_sam"
IDS = ("output_ids", "tokens", "input_ids")
ANSWERS = ("answers/*/answers.jsonl", "answers.jsonl", "answers/*/part-*.jsonl", "part-*.jsonl")
"""Where a folder of answers has them, finished ones first."""
TARGET_SIDE = ("gpt", "assistant", "model", "bot")


Document = tuple[str | list[int], bool]
"""A text or its token ids, and whether it is a reply that ended by itself."""


class Builder:
    """Documents in, an automaton out.

    Args:
        vocabulary: of the target.
        max_tokens: where to stop.
    """

    def __init__(self, vocabulary: Vocabulary, max_tokens: int) -> None:
        self.vocabulary, self.max_tokens = vocabulary, max_tokens
        self.automaton = Automaton()
        self.ends: list[int] = []
        self.n_documents = 0

    @property
    def full(self) -> bool:
        """Whether nothing more is taken in."""
        return len(self.ends) >= self.max_tokens

    def add(self, record: Any) -> None:
        """Take in the documents of a record: all of them, or none.

        Raises:
            RecordError: there are none in it, or one cannot be used.
        """
        for tokens in [self._tokens(*document) for document in documents(record)]:
            self.automaton.cut()
            for token in tokens[: self.max_tokens - len(self.ends)]:
                if token == self.vocabulary.image_token_id:
                    # Nothing continues across a picture, and its placeholder must never be drafted.
                    self.automaton.cut()
                    continue
                self.automaton.append(token, len(self.ends))
                self.ends.append(self.automaton.last)
            self.n_documents += 1

    def _tokens(self, document: str | list[int], finished: bool) -> list[int]:
        tokenizer = self.vocabulary.tokenizer
        if isinstance(document, str):
            tokens = list(tokenizer(document.strip(), add_special_tokens=False)["input_ids"])
        else:
            tokens = document
        outside = next((token for token in tokens if not 0 <= token < len(tokenizer)), None)
        if outside is not None:
            raise RecordError(f"token id outside of the vocabulary: {outside} of {len(tokenizer)}")
        return [*tokens, tokenizer.eos_token_id] if finished and tokenizer.eos_token_id is not None else tokens


def documents(record: Any) -> list[Document]:
    """The documents of a record.

    Raises:
        RecordError: there are none in it.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        return [(_checked(record), False)]
    if "bad" in record:
        # A run's shards hold their own unusable samples, which the run has reported.
        return []
    if key := next((key for key in (*IDS, "text") if key in record), None):
        return [(_checked(record[key]), False)]
    if "answers" in record:
        answers = record["answers"]
        if not isinstance(answers, list):
            raise RecordError(f"'answers' is no list but {type(answers).__name__}")
        return list(zip(map(_checked, answers), record.get("finished", [True] * len(answers))))
    if "conversations" in record or "messages" in record:
        return [(_checked(reply), True) for reply in _replies(record.get("conversations", record.get("messages")))]
    raise RecordError(f"record has no text; its keys are: {', '.join(sorted(record)[:8])}")


def _checked(document: Any) -> str | list[int]:
    """A text or token ids. Raises RecordError for anything else."""
    if isinstance(document, list) and all(type(token) is int for token in document):
        return document
    if not isinstance(document, str):
        raise RecordError(f"document is neither a text nor token ids but {type(document).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in document):
        raise RecordError("text is not valid Unicode")
    return document


def _replies(said: Any) -> list[Any]:
    """What the target's side says in a conversation, a message's text parts joined. Raises RecordError."""
    if not isinstance(said, list) or not all(isinstance(entry, dict) for entry in said):
        raise RecordError("conversation is no list of messages")
    mine = [entry for entry in said if entry.get("from", entry.get("role")) in TARGET_SIDE]
    if not mine:
        raise RecordError("conversation has no reply")
    return [_content(entry.get("value", entry.get("content"))) for entry in mine]


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def find(paths: Sequence[Path]) -> list[Path]:
    """The files to read.

    Raises:
        InputError: one is missing, of an unknown kind, or a folder without answers.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            parts = next(filter(None, (sorted(path.glob(where)) for where in ANSWERS)), [])
            if not parts:
                raise InputError(f"{path} holds no {ANSWERS[0]}; give a run folder, or the files themselves")
            files += parts
        elif not path.is_file():
            raise InputError(f"{path} does not exist")
        elif path.suffix not in (".txt", ".json", ".jsonl"):
            raise InputError(f"{path} is no .jsonl, .json or .txt file")
        else:
            files.append(path)
    return files


def read(path: Path) -> Iterator[tuple[Path, int, Any, int]]:
    """The records of a file: the file, line or place, record (a RecordError where it cannot be read), bytes it took."""
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                for line, raw in enumerate(file, start=1):
                    if raw.strip():
                        yield path, line, _parse(raw), len(raw)
            return
        text = path.read_text(encoding="utf-8")
        records = text.split("\n\n") if path.suffix == ".txt" else json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(records, list):
        raise InputError(f"{path} must be a list of records, not a {type(records).__name__}")
    for place, record in enumerate(records, start=1):
        if not isinstance(record, str) or record.strip():
            yield path, place, record, path.stat().st_size // len(records)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return RecordError("line is no JSON")


def build(args: argparse.Namespace, console: Console) -> None:
    """Reads, builds and writes.

    Raises:
        InputError: nothing usable, or too much that is not.
    """
    began = time.perf_counter()
    files = find(args.corpus)
    vocabulary = load_vocabulary(args.target)
    builder = Builder(vocabulary, args.max_tokens or sys.maxsize)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(args.out.with_name(f"{args.out.name}.quarantine.jsonl"), fresh=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("reading", total=sum(path.stat().st_size for path in files), figures="")
        n_read = 0
        for path, line, record, size in itertools.chain.from_iterable(map(read, files)):
            n_read += 1
            try:
                builder.add(record)
            except RecordError as error:
                quarantine.add(path, line, str(record.get("id", "")) if isinstance(record, dict) else "", str(error))
            progress.update(bar, advance=size, figures=f"{len(builder.ends):,} tokens")
            if builder.full:
                break
        quarantine.check(n_read, args.max_bad_share)
        if not builder.ends:
            raise InputError(f"no usable text among the {n_read} records of {', '.join(map(str, args.corpus))}")
        progress.update(bar, description="writing")
        arrays = freeze(builder.automaton, builder.ends)
        about = {"documents": str(builder.n_documents), "tokens": str(len(builder.ends))}
        save(args.out, arrays, vocabulary=vocabulary.fingerprint, target=args.target, **about)
    size = args.out.stat().st_size
    console.print(
        f"{args.out}: {builder.n_documents:,} documents, {len(builder.ends):,} tokens, {len(arrays['link']):,} states, "
        f"{len(arrays['tokens']):,} transitions, {size / 1e6:.1f} MB, {time.perf_counter() - began:.1f} s",
        soft_wrap=True,
        highlight=False,
    )
    if builder.full:
        console.print(f"stopped at --max-tokens {args.max_tokens}", style="yellow", soft_wrap=True)
    if quarantine.count:
        console.print(f"quarantined: {quarantine.count}, listed in {quarantine.path}", style="yellow", soft_wrap=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: an option is wrong.
    """
    parser = Parser(prog=f"scripts/{PROGRAM}.py", description=__doc__)
    add = parser.add_argument
    add("corpus", nargs="+", type=Path, metavar="CORPUS", help="run folders and files, see above")
    add("--target", required=True, metavar="NAME", help="whose tokens: tiny_llava, a folder, or a Hub id (no weights)")
    add("--out", required=True, type=Path, metavar="FILE", help="the file to write, as in sam.safetensors")
    add("--max-tokens", type=int, default=0, metavar="N", help="stop after so many tokens; 0: take all (default)")
    add_bad_share(parser)
    args = parser.parse_args(argv)
    if args.max_tokens < 0:
        raise InputError(f"--max-tokens must not be negative, got {args.max_tokens}")
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder; name the file to write")
    return args


@command(PROGRAM, wrong=(InputError, OSError))
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    build(arguments(argv), Console())


if __name__ == "__main__":
    sys.exit(main())
