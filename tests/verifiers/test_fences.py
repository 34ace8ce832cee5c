"""Fenced blocks are read as CommonMark says, and the program among them is found."""

from __future__ import annotations

import pytest

from opdengine.verifiers.fences import Block, fenced_blocks
from opdengine.verifiers.program import CodeTests, extract_program

PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"
GOOD = f"```python\n{PROGRAM}```"
STDIN = CodeTests(inputs=("3 4\n",), outputs=("7\n",))
ENTRY = CodeTests(inputs=((1,),), outputs=(2,), entry="f")

COMMONMARK = {
    "tildes": ("~~~py\nx\n~~~", [Block("py", "x\n")]),
    "longer fence holds shorter ones": ("````md\n```python\nx\n```\n````", [Block("md", "```python\nx\n```\n")]),
    "closing fence may be longer": ("```\nx\n`````\ny", [Block("", "x\n")]),
    "closing fence has no words": ("```\nx\n``` y\n```", [Block("", "x\n``` y\n")]),
    "tildes do not close backticks": ("```\nx\n~~~\n```", [Block("", "x\n~~~\n")]),
    "no closing fence": ("```py\nx\ny", [Block("py", "x\ny\n", closed=False)]),
    "indented by three": ("   ```py\n   x\n     y\n   ```", [Block("py", "x\n  y\n")]),
    "less indented lines": ("  ```\n x\n   y\n  ```", [Block("", "x\n y\n")]),
    "indented by four is no fence": ("a\n\n    ```py\n    x\n    ```\n```\ny\n```", [Block("", "y\n")]),
    "four spaces do not close": ("```py\ns = '''\n    ```\n'''\n```", [Block("py", "s = '''\n    ```\n'''\n")]),
    "in a list": ("1. Write:\n   ```py\n   x\n   ```\n2. Done", [Block("py", "x\n")]),
    "in a list of lists": ("- a\n  - b\n\n    ```py\n    x\n    ```", [Block("py", "x\n")]),
    "behind a list's mark": ("- ```py\n  x\n  ```", [Block("py", "x\n")]),
    "after a list": ("- a\n\nText\n\n```py\nx\n```", [Block("py", "x\n")]),
    "backtick in the info": ("``` a`b\n```py\nx\n```", [Block("py", "x\n")]),
    "code within a line": ("Use ```x``` and\n```py\ny\n```", [Block("py", "y\n")]),
    "title": ('```python title="a.py"\nx\n```', [Block("python", "x\n")]),
    "attributes": ("```{.python .numberLines}\nx\n```", [Block("python", "x\n")]),
    "path": ("```python:src/a.py\nx\n```", [Block("python", "x\n")]),
    "space before the language": ("```   Python3  \nx\n```", [Block("python3", "x\n")]),
    "line ends of other systems": ("```py\r\nx\r\ny\r```\r\n", [Block("py", "x\ny\n")]),
    "other separators stay": ("```py\nx = '\u2028\x0c'\n```", [Block("py", "x = '\u2028\x0c'\n")]),
    "empty": ("```\n```", [Block("", "")]),
    "behind text, for want of others": ("So: ```python\nx\n``` that is it", [Block("python", "x\n")]),
    "none": ("a `b` c", []),
}


@pytest.mark.parametrize("name", COMMONMARK)
def test_blocks(name: str) -> None:
    text, blocks = COMMONMARK[name]
    assert fenced_blocks(text) == blocks


@pytest.mark.parametrize(
    "text",
    [
        f"Example input:\n```text\n3 4\n```\nSolution:\n{GOOD}",
        f"```bash\npip install nothing\n```\n{GOOD}",
        f"In C++:\n```cpp\nint main(){{}}\n```\nIn Python:\n{GOOD}",
        f"{GOOD}\nIn C++:\n```cpp\nint main(){{}}\n```",
        f"{GOOD}\nOutput:\n```\n7\n```",
        f"{GOOD}\n```output\n7\n```",
        f"{GOOD}\n```bash\npython a.py\n```",
        f"```\n{PROGRAM}```\nOutput:\n```\n7\n```",
        f"```\n{PROGRAM}```\nOutput:\n```\nThe sum is 7\n```",
        f"```python\nprint('draft')\n```\nBetter:\n{GOOD}",
        f"```json\n{{}}\n```\n```\n{PROGRAM}```",
        "1. Write:\n   ```python\n   a, b = map(int, input().split())\n   print(a + b)\n   ```",
        f'```python title="a.py"\n{PROGRAM}```',
        f"```Python3\n{PROGRAM}```",
        f"```python\n{PROGRAM}",
        f"~~~python\n{PROGRAM}~~~",
        f"<think>```python\nno\n</think>{GOOD}",
    ],
)
def test_the_program_is_found_among_other_blocks(text: str) -> None:
    assert extract_program(text, STDIN) == f"\n{PROGRAM}"


def test_without_a_program_there_is_none() -> None:
    assert extract_program("```cpp\nint main(){}\n```", STDIN) == ""
    assert extract_program("```python\n```", STDIN) == ""
    assert extract_program(" \n", CodeTests(test="f()", prefix="import math\n")) == ""
    assert extract_program(PROGRAM, STDIN) == PROGRAM, "a text without any fence is the program"


def test_the_block_that_defines_the_entry_point_is_taken() -> None:
    defining = "```python\ndef f(x):\n    return 2\n```"
    assert extract_program(f"{defining}\nUse:\n```python\nprint(f(1))\n```", ENTRY) == "\ndef f(x):\n    return 2\n"
    untagged = defining.replace("python", "")
    assert extract_program(f"{untagged}\nUse:\n```python\nprint(f(1))\n```", ENTRY) == "\ndef f(x):\n    return 2\n"
    assert extract_program("```python\ndef fa(x): pass\n```", ENTRY) == "\ndef fa(x): pass\n"
