// Ties the page together: buttons and keys, what is remembered, the state of the server.
const REMEMBERED = ["system", "temperature", "topP", "maxTokens", "seed", "thinking"];
// What a program asks a model of each kind.
const CALLS = {
  completion: ["chat/completions", {messages: [{role: "user", content: "Hello"}]}],
  embedding: ["embeddings", {input: ["Hello"]}],
  rerank: ["rerank", {query: "What is a pagoda?", documents: ["A tower.", "A boat."]}],
};
let sees = false;

function showCurl(can) {
  const [path, what] = CALLS[Object.keys(CALLS).find(kind => can.includes(kind)) ?? "rerank"];
  const body = JSON.stringify({model: $("model").value, ...what}).replaceAll("'", "'\\''");
  const key = $("key").value ? " \\\n  -H 'authorization: Bearer YOUR_KEY'" : "";
  $("curl").textContent = `curl ${location.origin}${base}/v1/${path} \\\n  -H 'content-type: application/json'${key} \\\n  -d '${body}'`;
}
async function readModels() {
  models = (await (await ask("/v1/models")).json()).data;
  const wanted = settings.get("model");
  $("model").replaceChildren(...models.map(each => new Option(each.id, each.id, false, each.id === wanted)));
  $("model").hidden = false;
  await readModel();
}
async function readModel() {
  const told = await (await ask("/api/show", {model: $("model").value})).json(), can = told.capabilities ?? [];
  shown = told.details ?? {};
  sees = can.includes("vision");
  $("picture").hidden = !sees;
  $("thinkingLabel").hidden = !can.includes("thinking");
  const chats = can.includes("completion");
  $("form").hidden = $("ideas").hidden = !chats;
  $("greeting").textContent = say(chats ? "greeting" : "noChat");
  showCurl(can);
}
function showState(word, kind) {
  $("state").textContent = word;
  $("state").className = kind;
}
async function refresh() {
  try {
    const health = await fetch(base + "/health"), state = (await health.json()).status;
    showState(state === "ready" ? say("ready") : state, health.ok ? "ready" : "down");
    if (!models.length && health.ok) await readModels();
    if (!$("live").hidden) await refreshLive();
  } catch (error) {
    if (error.status === 401) {
      showState(say("needsKey"), "down");
      if ($("settings").hidden) { toggle("settings", true); $("key").focus(); }
    }
    else { showState(say("notReachable"), "down"); models = []; }
  }
}
function toggle(name, open = $(name).hidden) {
  $(name).hidden = !open;
  $(name + "Button").setAttribute("aria-expanded", String(open));
  if (open && innerWidth <= 760) toggle(name === "live" ? "settings" : "live", false); // a phone has room for one
  if (name === "live") { settings.set("live", open ? "1" : ""); if (open) refresh(); }
}
function speak() {
  sayAll();
  $("lang").textContent = say("language");
  $("theme").textContent = "◐";
  $("ideas").replaceChildren(...say("ideas").map(text => { const made = make("button", "", text); made.type = "button"; made.onclick = () => submit(text); return made; }));
  showAll();
}
function nextTheme() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  settings.set("theme", root.dataset.theme);
}
function listen() {
  $("form").onsubmit = event => { event.preventDefault(); submit($("text").value.trim()); };
  $("text").oninput = grow;
  $("text").onkeydown = event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
  };
  document.onkeydown = event => { if (event.key === "Escape") running?.abort(); };
  $("new").onclick = newChat;
  $("settingsButton").onclick = () => toggle("settings");
  $("liveButton").onclick = () => toggle("live");
  $("theme").onclick = nextTheme;
  $("lang").onclick = () => { language = language === "zh" ? "en" : "zh"; settings.set("language", language); speak(); if (models.length) readModel(); refresh(); };
  $("model").onchange = () => { settings.set("model", $("model").value); readModel(); };
  $("key").onchange = () => { models = []; refresh(); };
  $("picture").onclick = () => $("file").click();
  $("file").onchange = () => { addFiles($("file").files); $("file").value = ""; };
  document.onpaste = event => { if (sees) addFiles(event.clipboardData.files); };
  document.ondragover = event => { event.preventDefault(); $("form").classList.toggle("target", sees); };
  document.ondragleave = () => $("form").classList.remove("target");
  document.ondrop = event => { event.preventDefault(); document.ondragleave(); if (sees) addFiles(event.dataTransfer.files); };
  for (const id of REMEMBERED) {
    $(id).value = settings.get(id) ?? "";
    $(id).onchange = () => settings.set(id, $(id).value);
  }
}
if (settings.get("theme")) document.documentElement.dataset.theme = settings.get("theme");
turns = load();
buildPlots();
listen();
speak();
if (settings.get("live") && innerWidth > 760) toggle("live", true);
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 1500);
