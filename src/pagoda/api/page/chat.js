// The conversation: what was said, how it is shown, and the answer that is being written.
let turns = [], pictures = [], running = null;
const load = () => { try { return JSON.parse(settings.get("turns") ?? "[]"); } catch { return []; } };
const textOf = turn => (typeof turn.content === "string" ? turn.content : turn.content.filter(p => p.type === "text").map(p => p.text).join(""));
const imagesOf = turn => (typeof turn.content === "string" ? [] : turn.content.filter(p => p.type === "image_url").map(p => p.image_url.url));
// Pictures are kept too, as long as the browser has room for them.
const keep = () => settings.set("turns", JSON.stringify(turns)) || settings.set("turns", JSON.stringify(turns.map(t => ({...t, content: textOf(t)}))));

function parameters() {
  const number = id => ($(id).value === "" ? undefined : Number($(id).value));
  const body = {
    model: $("model").value, stream: true, stream_options: {include_usage: true},
    messages: turns.filter(t => !t.error).map(({role, content}) => ({role, content})),
    temperature: number("temperature"), top_p: number("topP"), max_tokens: number("maxTokens"), seed: number("seed"),
  };
  if ($("system").value.trim()) body.messages.unshift({role: "system", content: $("system").value});
  if ($("thinking").value) body.chat_template_kwargs = {enable_thinking: $("thinking").value === "on"};
  return body;
}
function button(word, run) {
  const made = make("button", "quiet", say(word));
  made.type = "button";
  made.onclick = () => run(made);
  return made;
}
function showTurn(turn, index) {
  const body = make("div", "body"), box = make("article", "turn " + turn.role + (turn.error ? " error" : ""));
  if (turn.role === "user") {
    box.append(...imagesOf(turn).map(url => shownPicture(url, say("picture"))));
    body.textContent = textOf(turn);
    body.hidden = !textOf(turn);
    box.append(body, make("div", "tools", button("edit", () => editFrom(index))));
    return box;
  }
  if (turn.reasoning) box.append(thinkingBox(turn));
  render(body, turn.content);
  if (turn.error) body.append(make("p", "failed", turn.error));
  const tools = make("div", "tools", button("copy", b => copyText(turn.content, b)), button("again", () => answerAgain(index)));
  if (turn.speed) tools.append(make("span", "speed", turn.speed));
  box.append(body, tools);
  return box;
}
function shownPicture(url, alt) {
  const img = make("img");
  img.src = url; img.alt = alt;
  return img;
}
function thinkingBox(turn) {
  const body = make("div", "body"), made = make("details", "thinking", make("summary", "", say("thought", turn.thought_s ?? "?")), body);
  render(body, turn.reasoning);
  return made;
}
function showAll() {
  $("log").replaceChildren(...turns.map(showTurn));
  $("empty").hidden = turns.length > 0;
  $("log").scrollTop = $("log").scrollHeight;
}
function editFrom(index) {
  running?.abort();
  $("text").value = textOf(turns[index]);
  pictures = imagesOf(turns[index]);
  showPictures();
  turns = turns.slice(0, index);
  keep(); showAll(); grow();
  $("text").focus();
}
function answerAgain(index) {
  if (running) return;
  turns = turns.slice(0, index);
  showAll();
  answer();
}
// Shows an answer while it grows: once per frame, and scrolling along only while the reader is at the end.
function writer(turn) {
  const body = make("div", "body waiting"), thinking = make("div", "body"), summary = make("summary", "", say("thinkingNow"));
  const fold = make("details", "thinking", summary, thinking), box = make("article", "turn assistant", body);
  $("log").append(box);
  let asked = false;
  const draw = () => {
    asked = false;
    const atEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
    if (turn.reasoning && !fold.isConnected) box.prepend(fold);
    if (turn.reasoning && fold.open) render(thinking, turn.reasoning);
    if (turn.content) { body.classList.remove("waiting"); render(body, turn.content); }
    if (turn.content && turn.reasoning) summary.textContent = say("thought", turn.thought_s);
    if (atEnd) $("log").scrollTop = $("log").scrollHeight;
  };
  fold.ontoggle = draw;
  draw();
  $("log").scrollTop = $("log").scrollHeight;
  return () => { if (!asked) { asked = true; requestAnimationFrame(draw); } };
}
async function read(turn, signal, draw) {
  const start = performance.now();
  let first = 0;
  for await (const event of chatEvents(parameters(), signal)) {
    const delta = event.choices[0]?.delta ?? {}, thought = delta.reasoning ?? delta.reasoning_content ?? "";
    if ((delta.content || thought) && !first) first = performance.now();
    turn.reasoning += thought;
    if (delta.content && turn.reasoning && turn.thought_s === undefined) turn.thought_s = ((performance.now() - start) / 1000).toFixed(1);
    turn.content += delta.content ?? "";
    if (event.choices[0]?.finish_reason === "length") turn.cut = true;
    if (event.usage) turn.speed = speed(event.usage.completion_tokens, first - start, performance.now() - first) + (turn.cut ? " · " + say("cut") : "");
    draw();
  }
}
function speed(tokens, first_ms, rest_ms) {
  const rate = tokens > 1 && rest_ms > 0 ? ` · ${((tokens - 1) / rest_ms * 1000).toFixed(0)} ${say("tokens")}/s` : "";
  return `${tokens} ${say("tokens")}${rate} · ${say("first")} ${Math.round(first_ms)} ms`;
}
async function answer() {
  const turn = {role: "assistant", content: "", reasoning: ""}, draw = writer(turn), asked = turns;
  running = new AbortController();
  $("send").textContent = say("stop");
  try {
    await read(turn, running.signal, draw);
  } catch (error) {
    // A TypeError is the network's: the browser's own words for it help nobody.
    if (error.name !== "AbortError") turn.error = error instanceof TypeError ? say("lost") : error.message;
  }
  running = null;
  $("send").textContent = say("send");
  if (turns !== asked) return; // a new chat was begun, or an older turn is edited
  if (turn.content || turn.reasoning || turn.error) turns.push(turn);
  keep(); showAll();
}
function submit(text) {
  if (running) { running.abort(); return; }
  if (!text && !pictures.length) return;
  const parts = pictures.map(url => ({type: "image_url", image_url: {url}}));
  if (text) parts.push({type: "text", text});
  turns.push({role: "user", content: pictures.length ? parts : text});
  pictures = [];
  showPictures();
  $("text").value = "";
  grow(); keep(); showAll();
  answer();
}
function newChat() {
  running?.abort();
  turns = [];
  keep(); showAll();
  $("text").focus();
}
function showPictures() {
  $("pictures").replaceChildren(...pictures.map((url, i) => {
    const made = make("button", "", shownPicture(url, ""), make("span", "", "×"));
    made.type = "button"; made.setAttribute("aria-label", say("remove"));
    made.onclick = () => { pictures.splice(i, 1); showPictures(); $("text").focus(); };
    return made;
  }));
}
async function addFiles(files) {
  for (const file of [...files].filter(each => each.type.startsWith("image/"))) pictures.push(await asUrl(file));
  showPictures();
  $("text").focus();
}
// Photos go smaller: every turn sends all pictures of the chat again.
async function asUrl(file) {
  const whole = () => new Promise(done => { const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(file); });
  if (file.size < 1500000) return whole();
  try {
    const bitmap = await createImageBitmap(file), scale = Math.min(1, 2048 / Math.max(bitmap.width, bitmap.height)), canvas = make("canvas");
    canvas.width = bitmap.width * scale; canvas.height = bitmap.height * scale;
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff"; pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.92);
  } catch { return whole(); } // a kind that the browser does not know; the server says what it takes
}
function grow() {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + "px";
}
