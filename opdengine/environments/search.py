"""Question answering with a search engine over the user's own documents (BM25).

The student searches up to ``max_searches`` times and then answers; the reward is exact match as SQuAD and
Search-R1 (arXiv 2503.09516) normalise it. The action format is that of SAGE-OPD (arXiv 2606.19659, App. A).
A corpus of millions of documents is indexed once::

    python -m opdengine.environments.search CORPUS.jsonl FOLDER

and the folder given as ``corpus``; the workers then share one memory-mapped index.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdengine.environments.actions import FORMATS, Action
from opdengine.environments.protocol import InfrastructureError, Observation, Step, Task
from opdengine.environments.rows import checked_rows, file_of
from opdengine.types import Message

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NOT_FOUND = "Nothing found."
NO_SEARCHES = "No searches are left; give your answer."
COMPLAINTS = {
    "search": "No action found. Write <action>search[query]</action> or <action>answer[text]</action>.",
    "tools": "No action found. Call the tool search or the tool answer, once per turn.",
}
INSTRUCTIONS = (
    "Answer the question. You may search a collection of documents up to {searches} times; each search shows "
    "its best {top} documents. Then give a short answer."
)
FORM = (
    " In every turn write a thought and one action:\n<thought>your thought</thought><action>search[query]</action>\n"
    "or, to finish,\n<thought>your thought</thought><action>answer[text]</action>"
)


@dataclass(frozen=True)
class Options:
    """The options.

    Args:
        corpus: file of documents with ``text``, and ``title`` and ``id`` if there are any; or a folder that
            ``python -m opdengine.environments.search`` has written.
        questions: split -> file of questions with ``question``, ``answers`` (a list, or one string; also
            ``golden_answers`` or ``answer``), and ``id``, ``type``, ``title`` (of the document that answers it,
            for the expert) if there are any.
        format: "search" (tags) or "tools" (native tool calls).
        instructions: begin with a system message that explains the actions.
        max_searches: searches per episode.
        top_k: documents per search.
        max_document_chars: longer documents are shown cut, with "..." at the end.
        skip_bad_rows: leave malformed rows out (counted in the log) instead of refusing the file.
    """

    corpus: str = ""
    questions: Mapping[str, str] = field(default_factory=dict)
    format: str = "search"
    instructions: bool = True
    max_searches: int = 8
    top_k: int = 3
    max_document_chars: int = 1000
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        checks = (
            (bool(self.corpus), "corpus", self.corpus, "a file of documents or the folder of an index"),
            (self.format in COMPLAINTS, "format", self.format, f"one of {sorted(COMPLAINTS)}"),
            (self.max_searches >= 0, "max_searches", self.max_searches, "0 or positive"),
            (self.top_k >= 1, "top_k", self.top_k, "at least 1"),
            (self.max_document_chars >= 1, "max_document_chars", self.max_document_chars, "at least 1"),
        )
        for ok, name, value, remedy in checks:
            if not ok:
                raise ValueError(f"search: {name}={value!r} is not possible; it must be {remedy}")


class Search:
    """The environment; see the module and :class:`Options`."""

    option_class = Options

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)
        self._index = open_index(self.options.corpus, skip_bad_rows=self.options.skip_bad_rows)

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """The questions of a split.

        Raises:
            ValueError: the split has no file, or the file cannot be used.
        """
        chosen = Options(**options)
        path = file_of(split, chosen.questions, "questions")
        return checked_rows(path, lambda n, row: _question(row, f"{split}-{n}"), skip_bad_rows=chosen.skip_bad_rows)

    def reset(self, *, seed: int, task: Task) -> Observation:
        """Ask the question; the seed changes nothing."""
        self._task, self._searches = task, 0
        question = f"Question: {task['question']}"
        messages: list[Message] = [{"role": "user", "content": question}]
        if self.options.instructions:
            text = INSTRUCTIONS.format(searches=self.options.max_searches, top=self.options.top_k)
            messages.insert(0, {"role": "system", "content": text + (FORM if self.options.format == "search" else "")})
        info = {"goal": task["question"], "type": task["type"], "observation": question}
        return Observation(tuple(messages), TOOLS if self.options.format == "tools" else (), info)

    def step(self, message: Message) -> Step:
        """Search or answer; a query without a known word finds nothing."""
        action = FORMATS[self.options.format](message)
        name, text, failure = self._read(action)
        executed = "" if failure else f"{name}[{text}]"
        if name == "answer" and not failure:
            score = exact_match(text, self._task["answers"])
            info = {"action": executed, "failure": "", "observation": "", "success": score == 1.0, "score": score}
            return Step((), score, terminated=True, info=info)
        if failure:
            observation = {"": COMPLAINTS[self.options.format], "search": NOT_FOUND if not text else NO_SEARCHES}[name]
        else:
            self._searches += 1
            observation = self._search(text)
        answer: Message = {"role": "user", "content": observation}
        if self.options.format == "tools" and isinstance(message, Mapping) and message.get("tool_calls"):
            answer = {"role": "tool", "name": action.name, "content": observation}
        return Step((answer,), info={"action": executed, "failure": failure, "observation": observation})

    def close(self) -> None:
        """There is nothing to give back."""

    def expert(self) -> Message:
        """Search for the title of the document that answers (or the question), then give the first gold answer."""
        query = self._task["title"] or self._task["question"]
        name, text = ("answer", self._task["answers"][0]) if self._searches else ("search", query)
        if self.options.format == "tools":
            call = {"name": name, "arguments": {ARGUMENTS[name]: text}}
            return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        return {"role": "assistant", "content": f"<thought>I know.</thought><action>{name}[{text}]</action>"}

    def _read(self, action: Action) -> tuple[str, str, str]:
        """Name ("" unless it is known), text and failure of an action."""
        if action.failure:
            return "", "", action.failure
        text = action.arguments.get(ARGUMENTS.get(action.name, "") if self.options.format == "tools" else "text")
        if action.name not in ARGUMENTS or not isinstance(text, str):
            return "", "", "tool_error"
        if action.name == "search" and (not text.strip() or self._searches >= self.options.max_searches):
            return action.name, text.strip(), "invalid_action"
        return action.name, text.strip(), ""

    def _search(self, query: str) -> str:
        try:
            found = self._index.search(query, self.options.top_k)
        except Exception as error:
            raise InfrastructureError(f"the search for {query!r} failed: {error}") from error
        limit = self.options.max_document_chars
        shown = [
            f"[{i}] {d['title']}: {d['text']}" if d["title"] else f"[{i}] {d['text']}" for i, d in enumerate(found, 1)
        ]
        return "\n".join(d if len(d) <= limit else d[: limit - 3] + "..." for d in shown) or NOT_FOUND


ARGUMENTS = {"search": "query", "answer": "text"}
TOOLS: tuple[Mapping[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {ARGUMENTS[name]: {"type": "string", "description": argument}},
                "required": [ARGUMENTS[name]],
            },
        },
    }
    for name, description, argument in (
        ("search", "Search the documents.", "Words to search for."),
        ("answer", "Answer the question and finish.", "The short answer."),
    )
)


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, with single spaces (SQuAD's evaluation)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 when the normalised prediction is one of the normalised answers."""
    return float(normalized(prediction) in {normalized(answer) for answer in answers})


class Index:
    """BM25 over documents with ``title`` and ``text``.

    Args:
        retriever: a ``bm25s.BM25``.
        documents: in the order in which they were indexed.
    """

    def __init__(self, retriever: Any, documents: Sequence[Mapping[str, str]]) -> None:
        self._retriever, self._documents = retriever, documents

    def search(self, query: str, count: int) -> list[Mapping[str, str]]:
        """The best documents that share a word with the query, best first."""
        words = [word for word in _words([query])[0] if word in self._retriever.vocab_dict]
        if not words:
            return []
        ids, scores = self._retriever.retrieve(
            [words], k=min(count, len(self._documents)), show_progress=False, backend_selection="numpy"
        )
        return [self._documents[int(i)] for i, score in zip(ids[0], scores[0], strict=True) if score > 0]


def open_index(corpus: str, *, skip_bad_rows: bool = False) -> Index:
    """An index of a file of documents, or the one that :func:`save_index` has written to a folder.

    Raises:
        DataError: the file or folder cannot be used.
        ImportError: bm25s is missing; names the pip command.
    """
    bm25s = _bm25s()
    if Path(corpus).is_dir():
        try:
            retriever = bm25s.BM25.load(corpus, mmap=True, load_corpus=True, show_progress=False)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"search: the folder {corpus!r} holds no index ({error}); {_how(corpus)}") from error
        documents, retriever.corpus = retriever.corpus, None  # otherwise it gives documents in place of numbers
        return Index(retriever, documents)
    documents = checked_rows(corpus, _document, skip_bad_rows=skip_bad_rows)
    return Index(_indexed(documents), documents)


def save_index(corpus: str, folder: str, *, skip_bad_rows: bool = False) -> int:
    """Index a file of documents and write the index, documents included.

    Returns:
        The number of documents.
    """
    documents = checked_rows(corpus, _document, skip_bad_rows=skip_bad_rows)
    _indexed(documents).save(folder, corpus=documents, show_progress=False)
    return len(documents)


def _indexed(documents: Sequence[Mapping[str, str]]) -> Any:
    retriever = _bm25s().BM25(backend="numpy")
    retriever.index(_words(f"{d['title']} {d['text']}" for d in documents), show_progress=False)
    return retriever


def _words(texts: Iterable[str]) -> list[list[str]]:
    """Words of each text; single letters count, stop words too: BM25 weighs them by itself."""
    words: list[list[str]] = _bm25s().tokenize(
        list(texts), stopwords=[], token_pattern=r"(?u)\b\w+\b", return_ids=False, show_progress=False
    )
    return words


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError('searching needs bm25s: pip install "opdengine[search]"') from error
    return bm25s


def _how(corpus: str) -> str:
    return f"write one with: python -m opdengine.environments.search CORPUS.jsonl {corpus}"


def _document(number: str, row: Mapping[str, Any]) -> dict[str, str]:
    text = row.get("text", row.get("contents"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no 'text'")
    return {"id": str(row.get("id", number)), "title": str(row.get("title") or ""), "text": text}


def _question(row: Mapping[str, Any], default_id: str) -> Task:
    question = row.get("question")
    answers = next((row[k] for k in ("answers", "golden_answers", "answer") if row.get(k)), None)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no 'question'")
    if not isinstance(answers, (list, tuple)) or not all(isinstance(a, str) for a in answers):
        raise ValueError("no 'answers' (a list of strings)")
    return {
        "id": str(row.get("id", default_id)),
        "type": str(row.get("type") or row.get("data_source") or "question"),
        "question": question.strip(),
        "answers": list(answers),
        "title": str(row.get("title") or ""),
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m opdengine.environments.search CORPUS.jsonl FOLDER")
    sys.stdout.write(f"indexed {save_index(sys.argv[1], sys.argv[2])} documents\n")
