r"""The verifier ``choice``: which of the lettered options does a text state as its answer?

A letter counts where it is stated, not where it is mentioned: ``\boxed{C}``, "the answer is C", "answer: (c)", "C is
correct", "I choose C", else a line that is or begins with the letter, else the words of an option. Letters that are
denied ("not A", "option A is wrong") are passed over; of several statements the last one counts; a statement of
several letters ("A or C") is none.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opdengine.models.chat import text_of
from opdengine.models.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.boxes import last_box
from opdengine.verifiers.score import NO_ANSWER, Reasoned

FEWEST_LETTERS = 10
"""These may be letters of options where the prompt lists none; the reference's letter may always."""
WINDOW = 100
"""Most characters between the word that announces an answer and its letter."""
NEAR = 20
"""Most characters from a letter to a word that denies it, or behind "therefore" to the letter."""

_DECORATION = re.compile(r"\\(?:text\w*|math\w+|mbox|bm|boldsymbol|fbox)\b ?\{?|[*_`$\"“”{}]|\\[()\[\]]")
_HEADING = re.compile(r"(answer|choice|option|solution|is|[:=])[ \t#]*\n[ \t\n#]*", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<!\b[Aa]ns)[.!?](?=\s|$)|[。\n;]")
_LETTER = re.compile(
    r"(?<![^\W\u3040-\u9fff])(?<!['’-])(?:\((?P<in>[A-Za-z])\)|\[(?P<at>[A-Za-z])\]|(?P<bare>[A-Za-z])(?![^\W\u3040-\u9fff]|['’+#]|-\w))"
)
_AFTER_ARTICLE = re.compile(
    r" (?!(?:because|since|as|and|or|is|was|but|not|which|where|for|due|by|given|so|from|with|in|at|on|if|that|rather|"
    r"instead|over|would|will|seems|looks|best|it|its|the|this|has|can)\b)[a-z]"
)
_DENIED_BEFORE = re.compile(
    r"\b(?:not|never|cannot|neither|nor|none|except|exclude[sd]?|eliminat(?:e[sd]?|ing)|reject\w*|rul\w+ out|than|"
    r"instead of|unlike|incorrect|wrong|false|no)\b|n['’]t\b",
    re.IGNORECASE,
)
_DENIED_CUE = re.compile(
    r"(?:\b(?:not|never|cannot|neither)\b|n['’]t\b)[ \w]{0,10}$|\b(?:wrong|incorrect|false|worst|unlikely|least \w+) $",
    re.IGNORECASE,
)
_CONTRAST = re.compile(r"\b(?:but|rather(?! than)|instead(?! of)|it is|it['’]s|so|therefore)\b", re.IGNORECASE)
_VERB = r"(?:is|was|are|were|would be|seems|looks|can be|could be|might be|may be|appears|sounds)"
_FAULT = r"(?:incorrect|wrong|false|tempting|eliminated|rejected|excluded|ruled out|plausible|a distractor|too\b)"
_DENIED_AFTER = re.compile(
    rf"[ )\]]{{0,2}}(?:{_VERB} (?:\w+ ){{0,2}}?(?:not\b|{_FAULT})|:? ?{_FAULT}|(?:\w{{1,5}}n['’]t|cannot|not)\b"
    r"(?! (?:option |choice )?[(\[]?[A-Za-z]\b))",
    re.IGNORECASE,
)
_LEADS = re.compile(
    r"(?:^|[:：=(\[\],>–—是为為-]|['’]s|n['’]t|\b(?:is|was|be|are|option|choice|letter|answer|that|think|believe|say|guess|"
    r"with|for|es|ist|est|either|neither|nor|or|and|but|both|between|not|than|of|to|so|thus|hence|therefore|"
    r"then|indeed|\w+ly))[ ]*$",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[ ,]{0,2}(?:or|and|/|,|&|\+|and/or|or maybe|or perhaps)[ ]?(?:option |choice )?", re.IGNORECASE)
_CUE = re.compile(
    r"\banswer(?:s|ed)?\b|\bans(?=[.:])\.?|答案|\b(?:antwort|respuesta|réponse|resposta|risposta|ответ)\b"
    r"|\b(?:option|choice|solution|result|response|letter|one|guess)\b"
    r"(?=(?: \w{2,}){0,3} ?(?:is\b|was\b|would be|must be|should be|:|=))"
    r"|\b(?:choose|chose|choosing|pick|picked|select|selected|selecting|opt(?:ed)? for|go(?:ing)? with|went with|"
    r"say|guess|leaves(?: us with| only)?|left with)\b"
    r"|\b(?:correct|right|best|final)\b(?= ?[:=])",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"[ )\]:,]{0,3}(?:is|are|was|must be|should be|would be|seems|appears|looks)\b[^.;\n]{0,30}?"
    r"\b(?:correct|right|the answer|the best|the only|best answer|my answer)\b(?! ?(?:if|only|when|of|about)\b)",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"\b(?:it|that|this)(?:['’]s| is| must be| would be| should be)\b|\b(?:therefore|thus|hence|so|must be)\b|=>|→|⇒",
    re.IGNORECASE,
)
_RETRACTS = re.compile(r"\b(?:wait|actually|correction|mistake|second thought|instead)\b", re.IGNORECASE)
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|unless|whether|why|were|might|may|could)\b"
    r"|\b(?:some|many|others|people|students)(?: \w+)? (?:$|(?:think|say|believe|choose|answer|claim|argue|pick|"
    r"select)\b)",
    re.IGNORECASE,
)
_BUT = re.compile(r"\b(?:but|however|yet)\b", re.IGNORECASE)
_CONDITION = re.compile(r"[ ,)\]]{0,3}(?:if|unless|only if)\b", re.IGNORECASE)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_ORDINAL = re.compile(rf"\b({'|'.join(_ORDINALS)})\b(?: \w+)? ?(?:option|choice|answer|one)\b", re.IGNORECASE)
_LINE = re.compile(
    r"(?:[-#>] ?)?(?:option |choice )?[(\[]?([A-Za-z])[)\]]?(?P<after> ?[.:,!)\]–—-](?=\s|$)| ?$)", re.IGNORECASE
)
_REASON = re.compile(r"[(\[]?([A-Z])[)\]]?(?P<after>) (?:because|since|as|due to|given)\b")
_OPTION = re.compile(r"[(\[]?([A-Z])[)\].:][ \t]+(\S.*)")


def choice(text: str, answer: Any, messages: Sequence[Message]) -> float:
    """1 when the option that a text states as its answer is the reference.

    Args:
        text: a completion; what stands behind its thoughts counts.
        answer: the letter of the right option ("C", "(c)").
        messages: of the prompt; options that are listed there (lines "A. ...") may be answered in their words.

    Returns:
        0 or 1; 0 with a ``detail`` where no option, or more than one, is stated.

    Raises:
        ValueError: the reference is not a letter.
    """
    right = str(answer).strip(" ().[]:").upper()
    if len(right) != 1 or right not in string.ascii_uppercase:
        raise ValueError(f"the reference answer {answer!r:.200} is not the letter of an option")
    part = answer_part(text)
    if part is None:
        return NO_ANSWER
    options = listed_options(messages)
    known = max([right, *options] if options else [right, string.ascii_uppercase[FEWEST_LETTERS - 1]])
    letters = string.ascii_uppercase[: string.ascii_uppercase.index(known) + 1]
    found = stated_letters(part, letters, options)
    if len(found) > 1:
        return Reasoned(0.0, f"several options are stated: {', '.join(sorted(found))}")
    return Reasoned(float(found == {right}), f"{min(found)} is stated" if found else "no option is stated")


def listed_options(messages: Sequence[Message]) -> dict[str, str]:
    """The options that the last user message lists: their words by letter, where they begin with A and have no gaps."""
    asked = [message for message in messages if message.get("role") == "user"]
    options: dict[str, str] = {}
    try:
        text = text_of(asked[-1].get("content")) if asked else ""
    except ValueError:  # a part that is neither text nor a picture that was read
        text = ""
    for line in text.split("\n"):
        found = _OPTION.match(line.strip())
        if found and found[1] == string.ascii_uppercase[len(options) % 26]:
            options[found[1]] = _words(found[2])
    return options if len(options) > 1 else {}


def stated_letters(text: str, letters: str, options: Mapping[str, str]) -> set[str]:
    """The letters of the last statement of an answer: none, one, or several where it is ambiguous.

    Args:
        text: a completion without thoughts.
        letters: of all options, in capitals.
        options: their words by letter, where they are known.
    """
    box, boxed = last_box(text), -1
    text = _HEADING.sub(r"\1 ", _DECORATION.sub("", _mark_box(text)))
    stated: set[str] = set()
    called: set[str] = set()
    for sentence in _sentences(text):
        if BOX in sentence:
            boxed = 1
            stated = _boxed(box or "", letters, options)
        elif not sentence.rstrip().endswith("?"):
            right = _called_right(sentence, letters)
            called = right or called
            stated = _announced(sentence, letters) or (right if _RETRACTS.search(sentence) else set()) or stated
    if stated or boxed > 0:
        return stated
    return called or _conclusion(text, letters) or _lines(text, letters) or _in_words(text, letters, options)


BOX = "\x00"


def _mark_box(text: str) -> str:
    """The text with a mark in place of its last box, which is read by itself."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return text.replace(BOX, "")
    return f"{text[:start].replace(BOX, '')}\n{BOX}\n{text[start:].partition('}')[2].replace(BOX, '')}"


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE.finditer(text):
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


def _boxed(box: str, letters: str, options: Mapping[str, str]) -> set[str]:
    content = _DECORATION.sub("", box).strip()
    if found := _LINE.match(content):
        rest = content[found.end() :]
        return _allowed({found[1]}, letters) | _joined(rest, letters)
    found_letters = [letter for letter, _, _ in _letters(content, letters)]
    return set(found_letters[:1]) | _joined(content[2:], letters) if found_letters else _same_words(content, options)


def _allowed(found: set[str], letters: str) -> set[str]:
    return {letter.upper() for letter in found} & set(letters)


def _letters(sentence: str, letters: str, start: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Letters of options with their places; "a" and "I" as words of English are none."""
    for found in _LETTER.finditer(sentence, start, len(sentence) if end is None else end):
        bare = found["bare"]
        letter = (found["in"] or found["at"] or bare).upper()
        if letter not in letters:
            continue
        if bare and (bare in "ai" or bare == "I" or (bare == "A" and _AFTER_ARTICLE.match(sentence, found.end()))):
            ends = re.match(r"[ ]?(?:[.,:;!?)]|$)", sentence[found.end() : found.end() + 2])
            if not ends:
                continue
        yield letter, found.start(), found.end()


def _joined(rest: str, letters: str) -> set[str]:
    """The letters that follow another one as its equals: "or C", "/ C", ", C and D"."""
    found: set[str] = set()
    place = 0
    while (link := _JOINED.match(rest, place)) and (letter := next(_letters(rest, letters, link.end()), None)):
        if letter[1] != link.end():
            break
        found.add(letter[0])
        place = letter[2]
    return found


def _announced(sentence: str, letters: str) -> set[str]:
    """ "The answer is C", "I choose C": the last one of a sentence."""
    stated: set[str] = set()
    for cue in _CUE.finditer(sentence):
        before = _BUT.split(sentence[max(cue.start() - WINDOW, 0) : cue.start()])[-1]
        if not _SUPPOSED.search(before) and not _DENIED_CUE.search(before):
            stated = _affirmed(sentence, cue.end(), letters) or stated
    return stated


def _called_right(sentence: str, letters: str) -> set[str]:
    """ "C is correct": the last one of a sentence. It may also explain why "all of the above" is the answer."""
    stated: set[str] = set()
    last: tuple[str, int, int] | None = None
    for each in _letters(sentence, letters):
        letter, start, end = each
        before = sentence[max(start - NEAR, 0) : start]
        right = _IS_RIGHT.match(sentence, end) and not _DENIED_AFTER.match(sentence, end)
        if right and not (_SUPPOSED.search(before) or _DENIED_BEFORE.search(before)):
            joined = last is not None and _JOINED.fullmatch(sentence, last[2], start)
            stated = {letter, last[0]} if last and joined else {letter}
        last = each
    return stated


def _affirmed(sentence: str, start: int, letters: str, window: int = WINDOW) -> set[str]:
    """The first letter behind a place that is not denied, with those that are joined to it."""
    last, was_denied = start, False
    for letter, begin, end in _letters(sentence, letters, start, start + window):
        between = sentence[last:begin]
        joined = was_denied and _JOINED.fullmatch(between)  # "not A or B"
        if not joined and not _LEADS.search(between) and sentence[begin] not in "([":
            continue
        contrasts = [found.end() for found in _CONTRAST.finditer(between)] if last > start else []
        denied = joined or _DENIED_BEFORE.search(between, contrasts[-1] if contrasts else 0)
        last, was_denied = end, bool(denied or _DENIED_AFTER.match(sentence, end))
        if not was_denied and not _CONDITION.match(sentence, end):
            return {letter} | _joined(sentence[end : end + WINDOW], letters)
    return set()


def _conclusion(text: str, letters: str) -> set[str]:
    """ "So it is C", "therefore, C": the last one."""
    stated: set[str] = set()
    for sentence in _sentences(text):
        if not sentence.rstrip().endswith("?"):
            for cue in _CONCLUSION.finditer(sentence):
                if not _SUPPOSED.search(sentence[max(cue.start() - WINDOW, 0) : cue.start()]):
                    stated = _affirmed(sentence, cue.end(), letters, NEAR) or stated
    return stated


def _lines(text: str, letters: str) -> set[str]:
    """A letter that stands alone on the last line or the first, else what all lines that begin with a letter name."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    found = [(_LINE.match(line) or _REASON.match(line), line) for line in lines]
    named = [(match, match.end() == len(line)) for match, line in found if match and match[1].upper() in letters]
    alone = [match[1].upper() for match, whole in named if whole and (match[0].strip() != "a" or len(lines) == 1)]
    if alone:
        return {alone[-1]} if found[-1][0] or len(set(alone)) == 1 else set(alone)
    return {match[1].upper() for match, _ in named if match[1].isupper() or match["after"].strip() in (")", ".", ":")}


def _in_words(text: str, letters: str, options: Mapping[str, str]) -> set[str]:
    """Options that are stated by their place ("the third option") or their words."""
    stated: set[str] = set()
    for sentence in _sentences(text):
        for cue in _CUE.finditer(sentence):
            said = re.sub(
                r"^[ :=,]*(?:(?:is|was|would be|must be|should be)\b[ :]*)?", "", sentence[cue.end() :][: 10 * WINDOW]
            )
            stated = _same_words(said, options) or stated
        places = {_ORDINALS.index(found.lower()) for found in _ORDINAL.findall(sentence)}
        if _CUE.search(sentence) and len(places) == 1 and (place := places.pop()) < len(letters):
            stated = {letters[place]}
    return stated or _same_words(text, options)


def _same_words(said: str, options: Mapping[str, str]) -> set[str]:
    words = _words(said)
    return {letter for letter, option in options.items() if option and option == words}


def _words(text: str) -> str:
    """Lower case, without decoration, articles and punctuation at the ends."""
    text = " ".join(_DECORATION.sub("", text).casefold().split()).strip(" .,:;!()")
    return re.sub(r"^(?:the|a|an) ", "", text)
