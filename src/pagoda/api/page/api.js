// The server, as the page asks it: health, models, metrics, chats.
const base = location.pathname.replace(/\/+$/, "").replace(/\/v1$/, "");
const $ = id => document.getElementById(id);
function headers() {
  const all = {"content-type": "application/json"};
  if ($("key").value) all.authorization = "Bearer " + $("key").value;
  return all;
}
async function ask(path, body, signal) {
  const how = body ? {method: "POST", body: JSON.stringify(body)} : {};
  const reply = await fetch(base + path, {headers: headers(), signal, ...how});
  if (!reply.ok) {
    const error = new Error(await reply.json().then(r => r.error?.message ?? r.error, () => reply.statusText));
    error.status = reply.status;
    throw error;
  }
  return reply;
}
// The events of one streamed chat, as they come.
async function* chatEvents(body, signal) {
  const reply = await ask("/v1/chat/completions", body, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new TypeError("the stream has no end");
    rest += value;
    const lines = rest.split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
// Prometheus text: the sum of each metric over its labels; buckets and comments left out.
function readMetrics(text) {
  const out = {};
  for (const line of text.split("\n")) {
    const m = line.match(/^([a-z_]+:[a-z0-9_]+)(?:\{[^}]*\})? ([-+0-9.eE]+)$/i);
    if (m && !m[1].endsWith("_bucket")) out[m[1]] = (out[m[1]] ?? 0) + Number(m[2]);
  }
  return out;
}
async function copyText(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else { // pages over plain http from another machine have no clipboard object
    const area = make("textarea", "", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = say("copied");
  setTimeout(() => { button.textContent = say("copy"); }, 1500);
}
