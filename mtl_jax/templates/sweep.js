"use strict";
// Selectors: a row is shown unless it has tokens of a selector's kind and not the chosen one.
const selects = [...document.querySelectorAll("select[data-kind]")];
const marked = [...document.querySelectorAll("[data-k]")].map(e => [e, e.dataset.k.split(" ")]);
function show() {
  // What has no selector, for there is one option, binds nothing; pairs and protocols do.
  const chosen = selects.map(s => [s.dataset.kind, s.value]).filter(c => c[1]);
  for (const [element, tokens] of marked)
    element.hidden = chosen.some(([kind, value]) =>
      !tokens.includes(value) && tokens.some(t => t[0] === kind));
  for (const note of document.querySelectorAll("p.none")) {
    const all = note.previousElementSibling.querySelectorAll("[data-k]");
    note.hidden = !all.length || [...all].some(e => !e.hidden);
  }
}
for (const form of document.querySelectorAll("form.controls")) {
  form.hidden = !form.querySelector("select");
  form.addEventListener("submit", event => event.preventDefault());
}
for (const select of selects) select.addEventListener("change", show);
show();

// Sorting: a click on a heading, numbers downwards first; rows of averages stay at the end.
function key(row, column) {
  const text = row.cells[column].firstChild ? row.cells[column].firstChild.textContent : "";
  const number = parseFloat(text.replace(/[<,+]/g, "").replace("−", "-"));
  return [Number.isNaN(number) ? null : number, text];
}
function sort(table, column, heading) {
  const text = heading.classList.contains("left");
  const before = heading.getAttribute("aria-sort");
  const up = before ? before === "descending" : text;
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].map(row => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (text) return a[1].localeCompare(b[1]) * (up ? 1 : -1);
      if (a[0] === null || b[0] === null) return (a[0] === null) - (b[0] === null);
      return (a[0] - b[0]) * (up ? 1 : -1);
    });
    body.append(...rows.map(([, row]) => row));
  }
}
for (const table of document.querySelectorAll("table.sortable"))
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, column, heading));
  });
