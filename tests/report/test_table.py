from __future__ import annotations

from repa_lab.report.tables import Table, latex

TABLE = Table(["arm", "n", "p"], [["a_b", "3", "<0.001"], ["x & y", "2 of 3", "n/a"]])


def test_columns_of_numbers_are_known() -> None:
    assert TABLE.is_number == [False, True, True]
    assert Table(["none"], [["n/a"], [""]]).is_number == [False]


def test_latex_by_hand() -> None:
    assert TABLE.latex.splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"arm & n & p \\",
        r"\midrule",
        r"a\_b & 3 & \textless{}0.001 \\",
        r"x \& y & 2 of 3 & n/a \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_shows_what_it_is_given() -> None:
    assert latex("50 % of $5 #1 {a}_b^c~\\") == (
        r"50 \% of \$5 \#1 \{a\}\_b\textasciicircum{}c\textasciitilde{}\textbackslash{}"
    )


def test_wide_tables_are_shrunk_to_the_line() -> None:
    wide = Table(list("abcdefg"), [list("1234567")]).latex
    assert wide.startswith("\\resizebox{\\linewidth}{!}{%\n\\begin{tabular}{rrrrrrr}")
    assert wide.endswith("\\end{tabular}}")


def test_empty_columns_are_left_out() -> None:
    assert Table(["a", "b", "c"], [["1", "n/a", ""], ["2", "n/a", "x"]]).without_empty_columns().headers == ["a", "c"]


def test_markdown_aligns_numbers_and_escapes_bars() -> None:
    assert Table(["a|b", "n"], [["x|y", "1"]]).markdown == "| a\\|b | n |\n| --- | ---: |\n| x\\|y | 1 |"
