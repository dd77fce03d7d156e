"use strict";
// Queries that one system answers better than another.

const PAGE = 25; // queries that are listed at once

function documentLine(number) {
  const [id, title, line] = DATA.documents[number];
  return [title || id, line || (title ? id : null)];
}

// Document -> leaves that hold it, for each tree; made when it is first needed.
const HOLDERS = new Map();
function leafOf(tree, number, visited) {
  if (tree === null || tree === undefined) return null;
  if (!HOLDERS.has(tree)) {
    const held = new Map();
    DATA.trees[tree].documents.forEach((documents, leaf) => documents.forEach((found) => {
      held.set(found, [...(held.get(found) || []), leaf]);
    }));
    HOLDERS.set(tree, held);
  }
  const leaves = HOLDERS.get(tree).get(number) || [];
  return (visited || []).find((leaf) => leaves.includes(leaf)) ?? leaves[0] ?? null;
}

function answerOf(number, query, grades) {
  const details = DATA.queries.rows[number];
  const row = DATA.rows[number];
  const leaves = details.leaves ? details.leaves[query] : null;
  const named = details.tree === null || details.tree === undefined ? null : DATA.trees[details.tree];
  const hits = details.hits[query].map((found) => {
    const [title, line] = documentLine(found);
    const leaf = leafOf(details.tree, found, leaves);
    const grade = grades.get(found);
    return make("li", {}, title,
      grade > 0 ? make("span", { class: "judged" }, grade === 1 ? "relevant" : `relevant, grade ${grade}`) : null,
      make("small", {}, [line, leaf === null ? null : `leaf ${named.paths[leaf].join("/")}`]
        .filter(Boolean).join(" · ")));
  });
  const parts = [
    make("h3", {}, rowName(row)),
    make("p", { class: "note" }, `nDCG@10 ${short(details.values[query])}, seed ${details.seed}`),
    hits.length ? make("ol", { class: "hits" }, ...hits) : make("p", { class: "note" }, "No hits are saved."),
  ];
  if (leaves) {
    const shown = leaves.slice(0, 40).map((leaf) => named
      ? make("button", { type: "button", onclick: () => openLeaf(details.tree, number, leaf) },
        named.paths[leaf].join("/"))
      : make("span", {}, String(leaf)));
    parts.push(
      make("p", { class: "note" }, `Scored ${many(details.visited[query], "document")} in ${many(leaves.length, "leaf", "leaves")}, best leaf first${leaves.length > 40 ? " (40 shown)" : ""}:`),
      make("div", { class: "leaves" }, ...shown));
  } else if (row.visit === null) {
    parts.push(make("p", { class: "note" }, "Scores all documents."));
  } else {
    parts.push(make("p", { class: "note" }, "The leaves that it visits are not saved."));
  }
  return make("div", {}, ...parts);
}

function openedQuery(query, a, b) {
  const judged = DATA.queries.judged[query];
  const grades = new Map(judged);
  const relevant = judged.filter(([, grade]) => grade > 0);
  const list = relevant.slice(0, 20).map(([found]) => {
    const [title, line] = documentLine(found);
    return make("li", {}, title, line ? make("small", {}, line) : null);
  });
  return make("div", { class: "opened" },
    make("h3", {}, `Judged relevant: ${relevant.length ? many(relevant.length, "document") : "not saved"}`),
    make("ul", { class: "hits" }, ...list),
    make("div", { class: "two" }, answerOf(a, query, grades), answerOf(b, query, grades)));
}

function showQueries() {
  const known = DATA.queries ? Object.keys(DATA.queries.rows).map(Number) : [];
  if (!known.length) {
    hideSection("queries", "No values of single queries are saved beside this run's records (trec/*.npy).");
    return;
  }
  const { names, texts } = DATA.queries;
  const options = known.map((number) => [number, rowName(DATA.rows[number])]);
  const [first, second] = DATA.pair.map((number) => known.includes(number) ? number : known[0]);
  fillSelect("row-a", options, first);
  fillSelect("row-b", options, second);
  const lower = names.map((name, n) => `${name} ${texts[n] || ""}`.toLowerCase());
  let outcome = "loses";
  let shown = PAGE;

  const entry = (query, a, b) => {
    const [x, y] = [a, b].map((row) => DATA.queries.rows[row].values[query]);
    const details = make("details", { ontoggle: () => {
      if (details.open && details.children.length === 1) details.append(openedQuery(query, a, b));
    } }, make("summary", {},
      make("span", { class: "asked" }, texts[query] || names[query],
        texts[query] ? make("small", {}, names[query]) : null),
      make("span", { class: "score" }, `A ${short(x)} · B ${short(y)} `,
        make("span", { class: x > y ? "win" : x < y ? "loss" : null },
          x === y ? "equal" : x > y ? `A wins by ${short(x - y)}` : `A loses ${short(y - x)}`))));
    return make("li", {}, details);
  };

  const draw = () => {
    const [a, b] = ["row-a", "row-b"].map((id) => Number(byId(id).value));
    const gain = names.map((_, n) => DATA.queries.rows[a].values[n] - DATA.queries.rows[b].values[n]);
    const kinds = {
      loses: ["A loses", (n) => gain[n] < 0], wins: ["A wins", (n) => gain[n] > 0],
      equal: ["equal", (n) => gain[n] === 0], all: ["all", () => true],
    };
    const words = byId("query-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = names.map((_, n) => n);
    byId("outcomes").replaceChildren(...Object.entries(kinds).map(([name, [text, test]]) => make("button", {
      type: "button", "aria-pressed": String(name === outcome), "data-outcome": name,
      onclick: () => { outcome = name; shown = PAGE; draw(); byId("outcomes").querySelector(`[data-outcome=${name}]`).focus(); },
    }, `${text}: ${count(all.filter(test).length)}`)));
    const found = all.filter((n) => kinds[outcome][1](n) && words.every((word) => lower[n].includes(word)));
    found.sort((p, q) => outcome === "wins" ? gain[q] - gain[p] : outcome === "all" ? 0 : gain[p] - gain[q]);
    byId("query-list").replaceChildren(...found.slice(0, shown).map((n) => entry(n, a, b)));
    byId("more-queries").hidden = found.length <= shown;
    const said = { loses: `that A (${DATA.rows[a].system}) loses to B (${DATA.rows[b].system}), the largest loss first`,
      wins: `that A (${DATA.rows[a].system}) wins against B (${DATA.rows[b].system}), the largest win first`,
      equal: "on which both are equal", all: "in all" }[outcome];
    byId("query-count").textContent = `${found.length === 1 ? "1 query" : count(found.length) + " queries"} ${said}${words.length ? ", with these words" : ""}.`;
  };
  const redraw = () => { shown = PAGE; draw(); };
  byId("row-a").addEventListener("change", redraw);
  byId("row-b").addEventListener("change", redraw);
  byId("query-search").addEventListener("input", redraw);
  byId("more-queries").addEventListener("click", () => { shown += PAGE; draw(); });
  draw();
}

showQueries();
