"use strict";
// Winners, the table of all results, effectiveness against cost, training.

function interval(measure) {
  const [, low, high] = measure;
  return low === null ? null : make("small", {}, `${short(low)} to ${short(high)}`);
}

function showWinners() {
  const value = (n) => DATA.rows[n].measures[MAIN][0];
  // Budgets are met on other queries, so what is visited here differs a little.
  const visited = ({ visit, costs }) => visit === null || costs.docs_visited === null ? null
    : make("small", {}, `visits ${exact(Number((100 * costs.docs_visited).toPrecision(3)))}%`);
  const lines = DATA.winners.map(({ rows: [first, second], p }) => {
    const best = DATA.rows[first];
    const cells = [
      make("td", { class: "text best" }, best.system, visited(best)),
      make("td", {}, short(value(first)), interval(best.measures[MAIN])),
    ];
    if (second === undefined) {
      cells.push(make("td", { class: "text", colspan: 4 }, "no other system at this budget"));
    } else {
      cells.push(
        make("td", { class: "text" }, DATA.rows[second].system, visited(DATA.rows[second])),
        make("td", {}, short(value(second)), interval(DATA.rows[second].measures[MAIN])),
        make("td", {}, "+" + short(value(first) - value(second))),
        make("td", {}, p === null ? "-" : p < 0.001 ? "<0.001" : short(p)),
      );
    }
    return make("tr", {}, make("th", { scope: "row" }, budgetWords(best)), ...cells);
  });
  const heads = [["Budget", 1], ["Best system", 1], ["nDCG@10", 0], ["Next best", 1],
    ["nDCG@10", 0], ["Difference", 0], ["p", 0]];
  byId("winner-table").replaceChildren(make("table", {},
    make("caption", {}, "Best system at each budget"),
    make("thead", {}, make("tr", {}, ...heads.map(([text, left]) => make("th",
      { scope: "col", class: left ? "text" : null }, make("span", {}, text))))),
    make("tbody", {}, ...lines)));
  const contested = DATA.winners.filter(({ rows }) => rows.length > 1);
  if (!contested.length) return;
  const least = contested.reduce((a, b) => {
    const visit = ({ rows }) => DATA.rows[rows[0]].visit ?? 100;
    return visit(b) < visit(a) ? b : a;
  });
  const [first, second] = least.rows;
  byId("winner-said").replaceChildren(
    `At the smallest budget (${budgetWords(DATA.rows[first])}), `,
    make("b", {}, DATA.rows[first].system), ` wins with nDCG@10 ${short(value(first))}, before `,
    make("b", {}, DATA.rows[second].system), ` with ${short(value(second))}.`);
}

// Column: name, value to sort by, text of a cell, whether it is text.
function resultColumns() {
  const kind = Object.fromEntries(DATA.systems.map((s) => [s.name, s.kind]));
  const cost = (name, key, digits, times = 1) => ({
    name, of: (row) => row.costs[key] === null ? null : times * row.costs[key],
    text: (value) => value === null ? "-" : value >= 1000 ? count(Math.round(value))
      : String(Number(value.toPrecision(digits))),
  });
  return [
    { name: "System", of: (row) => row.system, left: true },
    { name: "Kind", of: (row) => kind[row.system], left: true },
    { name: "Budget", of: (row) => (row.visit ?? 100) + (row.codes ?? 0) / 1e6,
      cell: (row) => budgetWords(row), left: true },
    cost("Visited %", "docs_visited", 3, 100),
    cost("Bytes a document", "bytes_per_doc", 4),
    ...DATA.measures.map((measure) => ({
      name: NAMES[measure] || measure, of: (row) => row.measures[measure]?.[0] ?? null,
      text: (value) => short(value), interval: (row) => row.measures[measure], best: true,
    })),
    cost("Work %", "work", 3, 100),
    cost("p50 ms", "latency_ms_p50", 3),
    cost("Queries/s", "qps_batch", 4),
    cost("Train s", "train_seconds", 3),
    { name: "Seeds", of: (row) => row.seeds.length },
  ];
}

function showResults() {
  const columns = resultColumns();
  let order = DATA.rows.map((row, number) => number);
  let sorted = null;
  let up = false;
  const body = make("tbody");
  const best = columns.map((column) => column.best
    ? Math.max(...DATA.rows.map((row) => column.of(row) ?? -1)) : null);
  const line = (number) => {
    const row = DATA.rows[number];
    return make("tr", {}, ...columns.map((column, n) => {
      const value = column.of(row);
      const text = column.cell ? column.cell(row) : column.text ? column.text(value) : String(value);
      if (n === 0) return make("th", { scope: "row", class: "text" }, text);
      const wins = column.best && value === best[n] && DATA.rows.length > 1;
      return make("td", { class: column.left ? "text" : wins ? "best" : null }, text,
        column.interval && column.interval(row) ? interval(column.interval(row)) : null);
    }));
  };
  const draw = () => {
    body.replaceChildren(...order.map(line));
    heads.forEach((head, n) => {
      if (n === sorted) head.setAttribute("aria-sort", up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };
  const sortBy = (n) => {
    up = sorted === n ? !up : Boolean(columns[n].left);
    sorted = n;
    const key = (number) => columns[n].of(DATA.rows[number]);
    const missing = (value) => value === null || value === undefined;
    order = order.slice().sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    });
    draw();
  };
  const heads = columns.map((column, n) => make("th",
    { scope: "col", class: column.left ? "text" : null },
    make("button", { type: "button", onclick: () => sortBy(n) }, column.name)));
  byId("result-table").replaceChildren(make("table", {},
    make("caption", {}, `${many(DATA.rows.length, "row")}: a system at a budget; the best value of a measure is bold`),
    make("thead", {}, make("tr", {}, ...heads)), body));
  draw();
}

const COSTS = [
  { key: "docs_visited", name: "Documents visited", unit: "%", times: 100 },
  { key: "work", name: "Work of a query, of scoring all documents", unit: "%", times: 100 },
  { key: "bytes_per_doc", name: "Bytes a document", unit: " bytes", times: 1 },
  { key: "latency_ms_p50", name: "Latency of one query, median", unit: " ms", times: 1 },
];

function costTraces(cost, measure) {
  return DATA.systems.map(({ name }) => {
    const style = styleOf(name);
    const trace = {
      type: "scatter", mode: "lines+markers", name: plain(name), legendgroup: name,
      x: [], y: [], text: [], hovertemplate: "%{text}<extra></extra>",
      line: { color: style.colour, width: 2 },
      marker: { color: style.colour, symbol: style.marker, size: 9 },
      error_y: { type: "data", symmetric: false, array: [], arrayminus: [], width: 3,
        thickness: 1, color: style.colour },
    };
    const known = DATA.rows.filter((row) => row.system === name
      && row.costs[cost.key] !== null && row.measures[measure]);
    // A line joins what differs in this cost only.
    const other = (row) => cost.key === "bytes_per_doc" ? row.visit : row.codes;
    for (const fixed of new Set(known.map(other))) {
      const some = known.filter((row) => other(row) === fixed);
      some.sort((a, b) => a.costs[cost.key] - b.costs[cost.key]);
      if (trace.x.length) [trace.x, trace.y].forEach((list) => list.push(null));
      if (trace.x.length) [trace.text, trace.error_y.array, trace.error_y.arrayminus].forEach((list) => list.push(0));
      for (const row of some) {
        const [value, low, high] = row.measures[measure];
        const spent = cost.times * row.costs[cost.key];
        trace.x.push(spent);
        trace.y.push(value);
        trace.error_y.array.push(high === null ? 0 : high - value);
        trace.error_y.arrayminus.push(low === null ? 0 : value - low);
        trace.text.push([`<b>${plain(rowName(row))}</b>`,
          `${NAMES[measure] || measure}: ${exact(value)}`,
          low === null ? "" : `95% interval: ${short(low)} to ${short(high)}`,
          `${cost.name}: ${exact(spent)}${cost.unit}`,
          row.seeds.length > 1 ? `mean of ${row.seeds.length} seeds` : `seed ${row.seeds[0]}`,
        ].filter(Boolean).join("<br>"));
      }
    }
    return trace;
  }).filter((trace) => trace.x.length);
}

function curveTraces() {
  return DATA.curves.map((curve) => ({
    type: "scatter", mode: "lines", legendgroup: curve.system, showlegend: false,
    name: plain(curve.run), x: curve.points.map(([share]) => 100 * share),
    y: curve.points.map(([, ndcg]) => ndcg),
    line: { color: styleOf(curve.system).colour, width: 1.2, dash: "dot" },
    hovertemplate: `${plain(curve.run)}, curve<br>nDCG@10: %{y:.4f}<br>Documents visited: %{x:.2f}%<extra></extra>`,
  }));
}

function showCosts() {
  const there = COSTS.filter(({ key }) => DATA.rows.some((row) => row.costs[key] !== null));
  fillSelect("cost", there.map((cost) => [cost.key, cost.name]), there[0].key);
  fillSelect("measure", DATA.measures.map((name) => [name, NAMES[name] || name]), MAIN);
  const draw = () => {
    const cost = COSTS.find(({ key }) => key === byId("cost").value);
    const measure = byId("measure").value;
    const curves = cost.key === "docs_visited" && measure === MAIN ? curveTraces() : [];
    byId("curve-note").textContent = curves.length
      ? "Dotted: every share of documents between one leaf and all of them." : "";
    // Without `dtick`, a logarithmic axis labels every digit.
    const ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];
    const x = axis(cost.unit === "%" ? `${cost.name} (%)` : cost.name + (cost.unit === " ms" ? " (ms)" : ""), {
      type: "log", tickvals: ticks, ticktext: ticks.map(count) });
    Plotly.react("cost-figure", [...costTraces(cost, measure), ...curves],
      layout({ xaxis: x, yaxis: axis(NAMES[measure] || measure) }), CONFIG);
  };
  byId("cost").addEventListener("change", draw);
  byId("measure").addEventListener("change", draw);
  draw();
}

function showTraining() {
  if (!DATA.training.length) {
    hideSection("training", "This run logged no training: metrics.jsonl is absent or empty.");
    return;
  }
  const names = [...new Set(DATA.training.flatMap((phase) => Object.keys(phase.of)))];
  names.sort((a, b) => (b === "loss") - (a === "loss") || (a < b ? -1 : 1));
  fillSelect("metric", names.map((name) => [name, name.replaceAll("_", " ")]), names[0]);
  const draw = () => {
    const name = byId("metric").value;
    const traces = DATA.training.map((phase, n) => ({
      type: "scatter", mode: "lines", name: plain(`${phase.run}: ${phase.phase}`),
      x: phase.steps, y: phase.of[name] || [],
      line: { color: COLOURS[n % COLOURS.length], width: 2,
        dash: ["solid", "dash", "dot"][Math.floor(n / COLOURS.length) % 3] },
      hovertemplate: "%{fullData.name}<br>step %{x}: %{y}<extra></extra>",
    })).filter((trace) => trace.y.some((value) => value !== null));
    Plotly.react("training-figure", traces, layout({ showlegend: true,
      xaxis: axis("Step"), yaxis: axis(name.replaceAll("_", " ")) }), CONFIG);
  };
  byId("metric").addEventListener("change", draw);
  draw();
}

showWinners();
showResults();
showCosts();
showTraining();
