"use strict";
(() => {
  const { rows, columns } = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 100;
  const WORDS = { failed: "failed", abstains: "no reliable answer", warnings: "warnings", extreme: "extreme" };
  const element = (id) => document.getElementById(id);
  const state = { key: "name", direction: 1, text: "", flags: new Set(), page: 0 };
  const order = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  for (const row of rows) {
    row.text = [row.name, row.scan, row.model, row.error, row.abstained, ...row.warnings].join("\n").toLowerCase();
  }

  function compare(a, b) {
    const [x, y] = [a[state.key], b[state.key]];
    if (state.key === "flags") return state.direction * (x.length - y.length);
    if (typeof x === "string") return state.direction * order.compare(x, y);
    if (x === null || y === null) return (x === null) - (y === null); // rows without a value come last
    return state.direction * (x - y);
  }

  function make(tag, text = "", name = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  }

  function makeRow(row) {
    const line = make("tr");
    const picture = make("td");
    if (/^[A-Za-z0-9+/=]+$/.test(row.picture)) {
      const image = make("img");
      image.alt = "";
      image.src = `data:image/jpeg;base64,${row.picture}`;
      picture.append(image);
    }
    const name = make("th", "", "name");
    name.scope = "row";
    const link = make("a", row.name);
    link.href = `./${encodeURIComponent(row.file)}`;
    name.append(link);
    if (row.scan && row.scan !== row.name) name.append(make("div", row.scan, "codes"));
    line.append(picture, name);
    for (const { key, unit } of columns) {
      const cell = make("td", "", "number");
      if (row[key] !== null) {
        const value = make("span", unit === "%" ? (100 * row[key]).toFixed(1) : row[key].toFixed(1));
        if (row.extremes.includes(key)) {
          value.className = "extreme";
          value.title = "extreme";
        }
        cell.append(value);
        const label = row[key.replace(/^p/, "l")];
        if (unit === "%" && label) cell.append(make("div", label, "codes"));
      }
      line.append(cell);
    }
    const flags = make("td");
    for (const flag of row.flags) flags.append(make("span", WORDS[flag], `flag ${flag}`));
    const details = [row.error, ...row.warnings].filter(Boolean).join(", ");
    if (details) flags.append(make("div", details, "codes"));
    line.append(flags, make("td", row.model, "codes"));
    return line;
  }

  function draw() {
    const chosen = rows.filter((row) => row.text.includes(state.text) && [...state.flags].every((flag) => row.flags.includes(flag)));
    chosen.sort(compare);
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const shown = chosen.slice(state.page * PAGE, (state.page + 1) * PAGE);
    element("rows").replaceChildren(...shown.map(makeRow));
    element("count").textContent = `${chosen.length} of ${rows.length} reports`;
    element("page").textContent = `page ${state.page + 1} of ${pages}`;
    element("previous").disabled = state.page === 0;
    element("next").disabled = state.page === pages - 1;
    for (const head of document.querySelectorAll("th[data-key]")) {
      if (head.dataset.key === state.key) head.setAttribute("aria-sort", state.direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
  }

  function change(values) {
    Object.assign(state, { page: 0 }, values);
    draw();
  }

  for (const head of document.querySelectorAll("th[data-key]")) {
    head.querySelector("button").addEventListener("click", () => {
      const { key } = head.dataset;
      const first = ["name", "model"].includes(key) ? 1 : -1; // numbers begin with the highest
      change({ key, direction: key === state.key ? -state.direction : first });
    });
  }
  element("search").addEventListener("input", ({ target }) => change({ text: target.value.trim().toLowerCase() }));
  for (const box of document.querySelectorAll("input[name=flag]")) {
    box.addEventListener("change", () => {
      state.flags[box.checked ? "add" : "delete"](box.value);
      change({});
    });
  }
  element("previous").addEventListener("click", () => change({ page: state.page - 1 }));
  element("next").addEventListener("click", () => change({ page: state.page + 1 }));
  draw();
})();
