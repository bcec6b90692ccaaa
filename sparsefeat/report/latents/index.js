"use strict";
// A row: latent, name, its AUC, density, images, largest, [[concept, AUC], ...], [image, ...]
const ROWS = JSON.parse(document.getElementById("rows").textContent);
const AT_ONCE = 100;
const body = document.querySelector("#latents tbody"), more = document.getElementById("more");
const search = document.getElementById("search"), named = document.getElementById("named");
const state = { by: 3, down: true, shown: AT_ONCE, rows: ROWS };

const text = ROWS.map(row => [row[1] || "", ...row[6].map(pair => pair[0])].join("\n").toLowerCase());

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function significant(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}

function number(column, shown) {
  const cell = element("td", { className: "number" }, shown);
  cell.dataset.column = column;
  cell.setAttribute("role", "cell");
  return cell;
}

function shownRow([latent, name, auc, density, images, largest, concepts, pictures]) {
  const href = `latents/${String(latent).padStart(5, "0")}.html`;
  const thumbnails = pictures.map(src => element("img", { src, alt: "", loading: "lazy" }));
  const shown = element("td", { className: "shown" }, element("span", {}, ...thumbnails));
  const head = element("th", { scope: "row" }, element("a", { href }, `latent ${latent}`));
  head.setAttribute("role", "rowheader");
  const proof = name === null ? "" : auc === null ? "given" : `AUC ${auc.toFixed(2)}`;
  const called = element("td", { className: "called" }, name === null ? "–" : name, element("small", {}, proof));
  const words = element("td", { className: "concepts" });
  words.append(...concepts.map(([word, area]) => element("span", {}, `${word} `, element("small", {}, area.toFixed(2)))));
  for (const cell of [shown, called, words]) cell.setAttribute("role", "cell");
  const row = element("tr", {}, shown, head, called, words, number("Density", `${significant(100 * density)} %`));
  row.append(number("Images", String(images)), number("Largest", significant(largest)));
  row.setAttribute("role", "row");
  return row;
}

function key(row) {
  if (state.by === 6) return row[6].length ? row[6][0][1] : null;
  return state.by === 1 && row[1] !== null ? row[1].toLowerCase() : row[state.by];
}

function compare(a, b) {
  const [x, y] = [key(a), key(b)];
  if (x === null || y === null) return (x === null) - (y === null) || a[0] - b[0];  // what has none comes last, either way
  const order = x < y ? -1 : x > y ? 1 : 0;
  return (state.down ? -order : order) || a[0] - b[0];
}

function show() {
  const asked = search.value.trim().toLowerCase();
  const digits = /^\d+$/.test(asked) ? Number(asked) : null;
  state.rows = ROWS.filter((row, i) => (!named.checked || row[1] !== null)
    && (asked === "" || row[0] === digits || text[i].includes(asked))).sort(compare);
  document.getElementById("found").textContent = `${state.rows.length.toLocaleString("en")} of ${ROWS.length.toLocaleString("en")} latents`;
  body.replaceChildren(...state.rows.slice(0, state.shown).map(shownRow));
  more.hidden = state.rows.length <= state.shown;
  for (const head of document.querySelectorAll("#latents th[data-by]")) {
    if (Number(head.dataset.by) === state.by) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

for (const head of document.querySelectorAll("#latents th[data-by]")) {
  head.querySelector("button").addEventListener("click", () => {
    const by = Number(head.dataset.by);
    state.down = by === state.by ? !state.down : by > 1;
    state.by = by;
    state.shown = AT_ONCE;
    show();
  });
}
search.addEventListener("input", () => { state.shown = AT_ONCE; show(); });
named.addEventListener("change", () => { state.shown = AT_ONCE; show(); });
more.addEventListener("click", () => {
  const first = state.shown;
  state.shown += AT_ONCE;
  body.append(...state.rows.slice(first, state.shown).map(shownRow));
  more.hidden = state.rows.length <= state.shown;
  body.children[first].querySelector("a").focus();
});
show();
