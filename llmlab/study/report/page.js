// Comforts on top of a page that is complete without them: the values under the pointer, and tables that sort.
"use strict";
for (const frame of document.querySelectorAll(".frame[data-series]")) {
  const {x, log, series} = JSON.parse(frame.dataset.series);
  const area = frame.querySelector(".area"), cross = document.createElement("div"), readout = document.createElement("div");
  cross.className = "cross"; readout.className = "readout"; cross.hidden = readout.hidden = true;
  area.append(cross, readout);
  const place = v => log ? Math.log(v / x[0]) / Math.log(x[1] / x[0]) : (v - x[0]) / (x[1] - x[0]);
  const steps = [...new Set(series.flatMap(s => s.x))];
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    const step = steps.reduce((a, b) => Math.abs(place(b) - at) < Math.abs(place(a) - at) ? b : a);
    const head = document.createElement("div");
    head.textContent = frame.dataset.at + " " + step.toLocaleString("en");
    readout.replaceChildren(head, ...series.flatMap(s => {
      const index = s.x.indexOf(step);
      if (index < 0 || s.y[index] === null) return [];
      const line = document.createElement("div"), swatch = document.createElement("i");
      line.className = s.class; line.append(swatch, s.name + " " + s.y[index].toPrecision(5));
      return [line];
    }));
    cross.hidden = readout.hidden = false;
    cross.style.left = 100 * place(step) + "%";
    readout.style.left = place(step) < .5 ? `calc(${100 * place(step)}% + .6rem)` : "auto";
    readout.style.right = place(step) < .5 ? "auto" : `calc(${100 - 100 * place(step)}% + .6rem)`;
  });
  area.addEventListener("pointerleave", () => { cross.hidden = readout.hidden = true; });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column], data = cell.querySelector("data");
    return data ? Number(data.value) : cell.textContent;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rank = value => typeof value === "number" ? 0 : 1;
      body.append(...[...body.rows].sort((a, b) => {
        const [p, q] = [key(a, column), key(b, column)];
        if (rank(p) !== rank(q)) return rank(p) - rank(q);
        return (up ? 1 : -1) * (typeof p === "number" ? p - q : p.localeCompare(q));
      }));
    });
  });
}
