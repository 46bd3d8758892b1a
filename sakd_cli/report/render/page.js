// Sorts by number where both cells begin with one (as format.py writes it), else by name; ties keep their order.
"use strict";
const figure = text => parseFloat(text.replace(/\u2212/g, "-").replace(/(\d) (?=\d{3}(?!\d))/g, "$1"));
document.querySelectorAll("table").forEach(table => table.querySelectorAll("th").forEach((head, column) =>
  head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
    const body = table.tBodies[0], rows = Array.from(body.rows), text = row => row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const x = figure(text(a)), y = figure(text(b));
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
      return down * (isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
    };
    rows.sort(compare).forEach(row => body.append(row));
  })));
// A long table scrolls in a box whose last row is half seen, since scroll bars may be hidden; on paper all is open.
const fit = () => document.querySelectorAll(".wide").forEach(box => {
  const row = Array.from(box.querySelectorAll("tbody tr")).find(one => one.offsetTop > 560);
  if (row) box.style.maxHeight = row.offsetTop + row.offsetHeight / 2 + box.offsetHeight - box.clientHeight + "px";
});
fit();
addEventListener("resize", fit);
addEventListener("toggle", fit, true);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => one.open = true));
