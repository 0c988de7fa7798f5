// The panel of live figures: a plot for each rate, the facts below.
const KEPT = 90;
const PLOTS = [
  ["rate", v => v.toFixed(v < 10 ? 1 : 0)], ["queue", (v, now) => `${v} / ${now.waiting}`],
  ["cache", v => `${(v * 100).toFixed(1)} %`], ["latency", v => (v ? `${(v * 1000).toFixed(1)} ms` : "–")],
];
const series = Object.fromEntries(PLOTS.map(([name]) => [name, []]));
let before = null, models = [], shown = {};

function figures(text) {
  const m = readMetrics(text), at = performance.now() / 1000;
  const count = m["vllm:inter_token_latency_seconds_count"] ?? 0, sum = m["vllm:inter_token_latency_seconds_sum"] ?? 0;
  const tokens = m["vllm:generation_tokens_total"] ?? 0;
  const now = {
    at, count, sum, tokens, rate: 0, latency: 0,
    queue: m["vllm:num_requests_running"] ?? 0, waiting: m["vllm:num_requests_waiting"] ?? 0,
    cache: m["vllm:kv_cache_usage_perc"] ?? 0, restarts: m["pagoda:engine_restarts_total"] ?? 0,
    preemptions: m["vllm:num_preemptions_total"] ?? 0,
    hits: (m["vllm:prefix_cache_hits_total"] ?? 0) / (m["vllm:prefix_cache_queries_total"] || 1),
  };
  if (before && at > before.at) {
    now.rate = Math.max(0, tokens - before.tokens) / (at - before.at);
    if (count > before.count) now.latency = (sum - before.sum) / (count - before.count);
  }
  before = now;
  return now;
}
function drawPlot(name, format, now) {
  const values = series[name];
  values.push(now[name]);
  if (values.length > KEPT) values.shift();
  const top = Math.max(...values, name === "cache" ? 0.02 : 1e-9);
  const points = values.map((v, i) => `${(KEPT - values.length + i).toFixed(1)},${(30 - 27 * v / top).toFixed(2)}`);
  const box = $("plot-" + name);
  box.querySelector("b").textContent = format(now[name], now);
  box.querySelector(".line").setAttribute("d", "M" + points.join("L"));
  box.querySelector(".area").setAttribute("d", `M${KEPT - values.length},30L${points.join("L")}L${KEPT - 1},30Z`);
}
function buildPlots() {
  const space = document.querySelector("svg").namespaceURI;
  const svg = (tag, attributes) => {
    const made = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  $("plots").replaceChildren(...PLOTS.map(([name]) => {
    const label = make("span", "");
    label.dataset.say = name;
    const plot = svg("svg", {viewBox: `0 0 ${KEPT - 1} 30`, preserveAspectRatio: "none", "aria-hidden": "true"});
    plot.append(svg("path", {class: "area"}), svg("path", {class: "line"}));
    const box = make("div", "plot", make("div", "", label, make("b", "", "–")), plot);
    box.id = "plot-" + name;
    return box;
  }));
}
function drawFacts(now) {
  const card = models.find(each => each.id === $("model").value) ?? models[0];
  const facts = {
    served: models.map(each => each.id).join(", "), context: card ? `${card.max_model_len.toLocaleString()} ${say("tokens")}` : "",
    architecture: [shown.family, shown.quantization_level].filter(Boolean).join(" · "),
    generated: now.tokens.toLocaleString(), hits: `${(now.hits * 100).toFixed(0)} %`,
    preemptions: now.preemptions, restarts: now.restarts,
  };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", "", say(name)), make("dd", "", String(value))]));
}
async function refreshLive() {
  const now = figures(await (await ask("/metrics")).text());
  for (const [name, format] of PLOTS) drawPlot(name, format, now);
  drawFacts(now);
}
