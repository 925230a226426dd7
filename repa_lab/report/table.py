"""A table of text, as Markdown and as LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass

from repa_lab.report.phrases import NONE

_NUMBER = re.compile(r"[+<-]?[\d.]")
_NOT_THERE = (NONE, "", "not reached")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
_LATEX |= {"|": r"\textbar{}", **{character: "\\" + character for character in "&%$#_{}"}}
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class Table:
    """Headers and rows of text; a table without rows is false."""

    headers: list[str]
    rows: list[list[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def is_number(self) -> list[bool]:
        """Of every column, whether all that stands in it begins with a number."""
        columns = [[row[place] for row in self.rows] for place in range(len(self.headers))]
        return [_are_numbers(column) for column in columns]

    @property
    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rules = ["---:" if number else "---" for number in self.is_number]
        lines = [self.headers, rules, *self.rows]
        return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)

    @property
    def latex(self) -> str:
        """The table as a ``tabular`` with booktabs' rules, shrunk to the line if it has many columns."""
        kinds = "".join("r" if number else "l" for number in self.is_number)
        head, *body = ["{} \\\\".format(" & ".join(map(latex, line))) for line in (self.headers, *self.rows)]
        lines = [
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        if len(self.headers) > _MOST_COLUMNS:
            lines = [r"\resizebox{\linewidth}{!}{%", *lines[:-1], lines[-1] + "}"]
        return "\n".join(lines)

    def without_empty_columns(self) -> Table:
        """Without the columns that say nothing in any row."""
        kept = [place for place in range(len(self.headers)) if any(row[place] not in _NOT_THERE for row in self.rows)]
        return Table([self.headers[place] for place in kept], [[row[place] for place in kept] for row in self.rows])


def latex(text: str) -> str:
    """Any text as LaTeX that shows it."""
    return "".join(_LATEX.get(character, character) for character in text.replace("\n", " "))


def _are_numbers(cells: list[str]) -> bool:
    there = [cell for cell in cells if cell not in _NOT_THERE]
    return bool(there) and all(_NUMBER.match(cell) for cell in there)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
