"use strict";
// Clicking a header sorts its table; what is not there (n/a) stays last either way.
const missing = (text) => text === "" || text === "n/a" || text === "not reached";
const value = (text, isNumber) => (isNumber ? parseFloat(text.replace(/[<,\s]/g, "")) : text);
const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));

function sort(table, column, isNumber, sign) {
  const text = (row) => row.cells[column].textContent.trim();
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [one, other] = [text(a), text(b)];
    if (missing(one) || missing(other)) return missing(one) - missing(other);
    return sign * compare(value(one, isNumber), value(other, isNumber));
  });
  table.tBodies[0].append(...rows);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    sort(head.closest("table"), head.cellIndex, head.classList.contains("number"), order === "ascending" ? 1 : -1);
  });
}
