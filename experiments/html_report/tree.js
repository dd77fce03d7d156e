"use strict";
// The leaves of a tree as tiles.

const SCALE = [[238, 244, 251], [158, 197, 232], [66, 146, 198], [8, 69, 126]];

function shade(share) {
  const place = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1);
  const low = Math.min(Math.floor(place), SCALE.length - 2);
  const mixed = SCALE[low].map((from, n) => Math.round(from + (SCALE[low + 1][n] - from) * (place - low)));
  return `rgb(${mixed.join(",")})`;
}

// Rows that search a tree, and know the leaves of their queries.
function rowsOfTree(tree) {
  if (!DATA.queries) return [];
  return Object.entries(DATA.queries.rows)
    .filter(([, details]) => details.tree === tree && details.leaves).map(([number]) => Number(number));
}

function visitsOf(row, leaves) {
  const visits = new Array(leaves).fill(0);
  if (row === null) return visits;
  for (const visited of DATA.queries.rows[row].leaves) for (const leaf of visited) visits[leaf] += 1;
  return visits;
}

const leafName = (tree, leaf) => `leaf ${tree.paths[leaf].join("/")}`;

function tiles(tree, visits, most) {
  const root = "all";
  const sum = new Map([[root, 0]]);
  const parents = new Map([[root, ""]]);
  tree.paths.forEach((path, leaf) => {
    for (let depth = path.length; depth >= 0; depth -= 1) {
      const id = depth ? path.slice(0, depth).join("/") : root;
      sum.set(id, (sum.get(id) || 0) + tree.sizes[leaf]);
      if (depth) parents.set(id, depth > 1 ? path.slice(0, depth - 1).join("/") : root);
    }
  });
  const leafAt = new Map(tree.paths.map((path, leaf) => [path.join("/"), leaf]));
  const ids = [...sum.keys()];
  const isLeaf = (id) => leafAt.has(id);
  return {
    type: "treemap", branchvalues: "total", ids, parents: ids.map((id) => parents.get(id)),
    values: ids.map((id) => sum.get(id)),
    labels: ids.map((id) => id === root ? "all documents" : isLeaf(id) ? leafName(tree, leafAt.get(id)) : `node ${id}`),
    text: ids.map((id) => isLeaf(id) ? tree.words[leafAt.get(id)].slice(0, 2).map(plain).join("<br>") : ""),
    hovertext: ids.map((id) => isLeaf(id) ? [`<b>${leafName(tree, leafAt.get(id))}</b>`,
      many(tree.sizes[leafAt.get(id)], "document"), `visited by ${many(visits[leafAt.get(id)], "query", "queries")}`,
      plain(tree.words[leafAt.get(id)].join(", "))].join("<br>") : many(sum.get(id), "document")),
    customdata: ids.map((id) => isLeaf(id) ? leafAt.get(id) : null),
    hoverinfo: "text", textinfo: "label+text", pathbar: { visible: tree.paths[0].length > 1 },
    tiling: { pad: 1 }, textfont: { size: 12 },
    marker: { pad: { t: 20, l: 2, r: 2, b: 2 }, line: { width: 0.5, color: "#fff" },
      colors: ids.map((id) => isLeaf(id) ? shade(most ? visits[leafAt.get(id)] / most : 0) : "#ffffff") },
  };
}

function showLeaf(number, row, leaf) {
  const tree = DATA.trees[number];
  const visits = visitsOf(row, tree.sizes.length);
  const listed = tree.documents[leaf];
  const items = listed.map((found) => {
    const [title, line] = documentLine(found);
    return make("li", { "data-id": DATA.documents[found][0] }, title, line ? make("small", {}, line) : null);
  });
  const all = listed.length === tree.sizes[leaf] ? "" : ` (the first ${count(listed.length)} are listed)`;
  const visited = row === null ? "" : `; ${count(visits[leaf])} of ${count(DATA.queries.names.length)} queries visit it`;
  byId("leaf-shown").replaceChildren(
    make("h3", {}, `${leafName(tree, leaf)} of ${tree.name}: ${many(tree.sizes[leaf], "document")}${all}${visited}`),
    make("p", { class: "words" }, tree.words[leaf].length ? "Frequent words: " : "",
      ...tree.words[leaf].map((word) => make("span", {}, word))),
    make("div", { class: "listed", tabindex: "0", role: "group", "aria-label": `documents of ${leafName(tree, leaf)}` },
      make("ol", { class: "documents" }, ...items)));
  byId("leaf").value = String(leaf);
}

let drawTree = () => {};

// A click on a leaf of an opened query.
function openLeaf(tree, row, leaf) {
  byId("tree-name").value = String(tree);
  drawTree(row, leaf);
  byId("leaf-shown").scrollIntoView({ block: "start" });
}

function showTree() {
  if (!DATA.trees.length) {
    hideSection("tree", "No index with a tree lies beside these records (index, indexes/).");
    return;
  }
  const preferred = DATA.pair.map((row) => DATA.queries && DATA.queries.rows[row] ? DATA.queries.rows[row].tree : null)
    .find((tree) => tree !== null && tree !== undefined) ?? 0;
  fillSelect("tree-name", DATA.trees.map((tree, n) => [n, tree.name]), preferred);
  drawTree = (wantedRow, wantedLeaf) => {
    const number = Number(byId("tree-name").value);
    const tree = DATA.trees[number];
    const rows = rowsOfTree(number);
    const row = rows.includes(wantedRow) ? wantedRow : rows[0] ?? null;
    const options = rows.map((found) => [found, budgetWords(DATA.rows[found])]);
    fillSelect("tree-row", options.length ? options : [["", "visits are not saved"]], row ?? "");
    const visits = visitsOf(row, tree.sizes.length);
    const most = Math.max(...visits);
    const busiest = visits.indexOf(most);
    fillSelect("leaf", tree.sizes.map((size, leaf) => [leaf, `${tree.paths[leaf].join("/")}: ${many(size, "document")}, ${tree.words[leaf].slice(0, 3).join(", ")}`]), busiest);
    byId("tree-scale").hidden = row === null;
    byId("scale-low").textContent = "0 queries";
    byId("scale-high").textContent = many(most, "query", "queries");
    Plotly.react("tree-figure", [tiles(tree, visits, most)], 
      layout({ margin: { l: 0, r: 0, t: 0, b: 0 },
        // On a telephone, texts that would be too small are left out.
        uniformtext: window.innerWidth < 640 ? { minsize: 9, mode: "hide" } : undefined }),
      { ...CONFIG, displayModeBar: false });
    const figure = byId("tree-figure");
    figure.removeAllListeners("plotly_treemapclick");
    figure.on("plotly_treemapclick", (event) => {
      const leaf = event.points[0].customdata;
      if (leaf === null || leaf === undefined) return true;
      showLeaf(number, row, leaf);
      return false; // the tile does not fill the figure
    });
    byId("leaf").onchange = () => showLeaf(number, row, Number(byId("leaf").value));
    showLeaf(number, row, wantedLeaf ?? busiest);
  };
  byId("tree-name").addEventListener("change", () => drawTree());
  byId("tree-row").addEventListener("change", () => drawTree(Number(byId("tree-row").value)));
  drawTree(DATA.pair[0]);
}

showTree();
