"use strict";
// Everything that comes from the data becomes text nodes: nothing of it is HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MAIN = "ndcg@10";
const NAMES = {
  "ndcg@10": "nDCG@10", "rr@10": "RR@10", "recall@10": "Recall@10",
  "recall@100": "Recall@100", "recall@1000": "Recall@1000",
  "exact_recall@10": "Exact recall@10",
};
// Okabe and Ito's palette without yellow, and three more; then colours repeat with other markers.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
  "#7B3FA0", "#8B5A2B", "#7A8288"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star"];
const CONFIG = { displaylogo: false, responsive: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };

const byId = (id) => document.getElementById(id);

function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Plotly reads some tags in its texts; a name has none.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");

// As a record has it: six significant digits.
const exact = (value) => String(Number(value.toPrecision(6)));
const short = (value, digits = 3) => value === null ? "-" : value.toFixed(digits);
const count = (value) => value.toLocaleString("en-US");
const many = (number, one, more = one + "s") => `${count(number)} ${number === 1 ? one : more}`;

function budgetWords(row) {
  const visited = row.visit === null ? "all documents" : `${row.visit}% visited`;
  return row.codes === null ? visited : `${visited}, ${row.codes}x smaller`;
}

const rowName = (row) => `${row.system}, ${budgetWords(row)}`;
const percent = (share) => share === null ? null : 100 * share;

function styleOf(system) {
  const n = DATA.systems.findIndex((found) => found.name === system);
  return { colour: COLOURS[n % COLOURS.length], marker: MARKERS[n % MARKERS.length] };
}

function fillSelect(id, options, chosen) {
  byId(id).replaceChildren(...options.map(([value, text]) => {
    const option = make("option", { value }, text);
    option.selected = String(value) === String(chosen);
    return option;
  }));
}

function hideSection(id, why) {
  const section = byId(id);
  section.replaceChildren(section.querySelector("h2"), make("p", { class: "note" }, why));
}

function layout(more) {
  const narrow = window.innerWidth < 640;
  return {
    font: { family: "system-ui, sans-serif", size: 13, color: "#1c2127" },
    margin: { l: 64, r: 16, t: 16, b: 52 },
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: "#fff", font: { color: "#1c2127", size: 13 } },
    legend: narrow ? { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }
      : { x: 1.02, y: 1 },
    ...more,
  };
}

const axis = (text, more) => ({
  title: { text }, gridcolor: "#e6eaee", linecolor: "#aab4bf", zeroline: false, ...more,
});
