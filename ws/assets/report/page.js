"use strict";
// Tables sort by a click on a column's head; a table that scrolls can be reached by the keyboard; the index has a filter.
// a cell sorts by the number that it begins with, alone or with its unit, its range or what it is a part of
const number = (text) => (/^[\s+\-\u2212]*[\d.,]+(e[+\-]?\d+)?\s*([%xs]|nats)?(\s*([(\[\u00b1]|\+-|of\s).*)?$/i.test(text) ? parseFloat(text.replace(/,/g, "").replace("\u2212", "-")) : NaN);
const before = (a, b) => {
  const [x, y] = [number(a), number(b)];
  if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
  return Number.isNaN(x) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
};
for (const table of document.querySelectorAll("table")) {
  if (table.scrollWidth > table.clientWidth + 1) table.tabIndex = 0;
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.rows.length < 3) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const text = (row) => (row.cells[column] ? row.cells[column].textContent.trim() : "");
      const numbers = [...body.rows].some((row) => !Number.isNaN(number(text(row))));
      const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : numbers;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const known = [...body.rows].filter((row) => !numbers || !Number.isNaN(number(text(row))));
      const rest = [...body.rows].filter((row) => !known.includes(row));
      known.sort((a, b) => (down ? -1 : 1) * before(text(a), text(b)));
      body.append(...known, ...rest);
    });
  });
}
const filter = document.getElementById("filter");
if (filter) {
  const all = [...document.querySelectorAll("[data-find]")];
  const seen = document.getElementById("seen");
  const look = () => {
    const whole = (text) => ` ${text.toLowerCase()} `.replace(/\bseeds?[ _](\d+)(?=\s)/g, "seed#$1#"); // seed 1 is not seed 10
    const words = whole(filter.value).split(/\s+/).filter(Boolean);
    for (const one of all) one.hidden = !words.every((word) => whole(one.dataset.find).includes(word));
    for (const group of document.querySelectorAll("section.group")) {
      const found = group.querySelectorAll("[data-find]:not([hidden])");
      group.hidden = !found.length;
      for (const fold of group.querySelectorAll("details.nulls")) fold.open = words.length > 0 && fold.querySelector("[data-find]:not([hidden])") !== null;
    }
    seen.textContent = `${all.filter((one) => !one.hidden).length} of ${all.length}`;
  };
  filter.addEventListener("input", look);
  look();
}
