// Markdown to nodes. Text only ever becomes text nodes, so nothing that a model writes can become markup.
const make = (tag, cls, ...children) => {
  const made = document.createElement(tag);
  if (cls) made.className = cls;
  made.append(...children);
  return made;
};
const INLINE = /(`+)([\s\S]+?)\1(?!`)|\*\*(\S|\S[\s\S]*?\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]*[^\s*])\*(?![\w*])|(?<!\w)_(\S|\S[^_\n]*?\S)_(?!\w)|~~(\S[\s\S]*?)~~|\[([^\]\n]+)\]\(((?:https?:\/\/|mailto:)[^\s)]+)\)|(https?:\/\/[^\s<>()\u3000-\u30ff\uff00-\uffef]+[^\s<>().,;:!?'"\u3000-\u30ff\uff00-\uffef])/g;
function link(target, ...text) {
  const made = make("a", "", ...text);
  made.href = target; made.target = "_blank"; made.rel = "noreferrer noopener";
  return made;
}
function inline(text) {
  const out = [];
  let from = 0;
  for (const m of text.matchAll(INLINE)) {
    out.push(text.slice(from, m.index));
    from = m.index + m[0].length;
    if (m[2] !== undefined) out.push(make("code", "", m[2]));
    else if (m[3] !== undefined) out.push(make("strong", "", ...inline(m[3])));
    else if ((m[4] ?? m[5]) !== undefined) out.push(make("em", "", ...inline(m[4] ?? m[5])));
    else if (m[6] !== undefined) out.push(make("del", "", ...inline(m[6])));
    else if (m[7] !== undefined) out.push(link(m[8], ...inline(m[7])));
    else out.push(link(m[9], m[9]));
  }
  out.push(text.slice(from));
  return out;
}
const FENCE = /^\s{0,3}(```+|~~~+)\s*([^`]*)$/, ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/, ROW = /^\s*\|.*\|\s*$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/, HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;

// The top-level blocks of a text, as text: while an answer grows, only the last one changes.
function blocks(text) {
  const out = [], lines = text.replace(/\r/g, "").split("\n");
  let now = [], fence = "";
  const end = () => { if (now.length) out.push(now.join("\n")); now = []; };
  const inList = () => ITEM.test(now[0] ?? "");
  for (const line of lines) {
    const mark = line.match(FENCE), indented = /^\s{2,}/.test(line);
    if (!fence && inList() && line.trim() && !ITEM.test(line) && !indented && (mark || now.at(-1) === "")) end();
    if (fence) {
      now.push(line);
      if (mark && mark[1].startsWith(fence) && !mark[2]) { fence = ""; end(); }
    } else if (mark && !inList()) {
      end(); now = [line]; fence = mark[1];
    } else if (!line.trim()) {
      if (inList()) now.push(""); else end();
    } else if (HEADING.test(line) || RULE.test(line)) { end(); out.push(line); }
    else {
      if (!inList() && now.length && (ITEM.test(line) || ROW.test(line) !== ROW.test(now.at(-1)))) end();
      now.push(line);
    }
  }
  end();
  return out;
}
function codeBlock(text, name) {
  const copy = make("button", "quiet", say("copy"));
  copy.type = "button";
  copy.onclick = () => copyText(text, copy);
  return make("div", "code", make("div", "bar", make("span", "", name), copy), make("pre", "", make("code", "", text)));
}
function list(lines) {
  const first = lines[0].match(ITEM), depth = first[1].length, ordered = /\d/.test(first[2]);
  const made = make(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2]) !== 1) made.start = parseInt(first[2]);
  let item = [];
  const end = () => { if (item.length) made.append(make("li", "", ...listItem(item))); };
  for (const line of lines) {
    const m = line.match(ITEM);
    if (m && m[1].length <= depth + 1) { end(); item = [m[3]]; } else item.push(line);
  }
  end();
  return made;
}
function listItem(lines) {
  const at = lines.findIndex((line, i) => i && (ITEM.test(line) || FENCE.test(line) || !line));
  const head = at < 0 ? lines : lines.slice(0, at), rest = at < 0 ? [] : lines.slice(at);
  const indent = Math.min(...rest.filter(line => line.trim()).map(line => line.match(/^\s*/)[0].length));
  const below = rest.map(line => line.slice(Number.isFinite(indent) ? indent : 0)).join("\n");
  return [...inline(head.map(line => line.trim()).join(" ")), ...blocks(below).map(block)];
}
function table(lines) {
  const cells = line => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
  const headed = lines.length > 1 && /^[\s|:-]+$/.test(lines[1]);
  const body = lines.filter((_, i) => !(headed && i === 1));
  const rows = body.map((line, i) => make("tr", "", ...cells(line).map(c => make(headed && !i ? "th" : "td", "", ...inline(c)))));
  return make("div", "table", make("table", "", ...rows));
}
function block(text) {
  const lines = text.split("\n"), fence = lines[0].match(FENCE), heading = text.match(HEADING);
  if (fence) {
    const closed = lines.length > 1 && FENCE.test(lines.at(-1)) && !lines.at(-1).match(FENCE)[2];
    return codeBlock(lines.slice(1, closed ? -1 : undefined).join("\n"), fence[2].trim());
  }
  if (heading) return make("h" + Math.min(heading[1].length, 4), "", ...inline(heading[2]));
  if (RULE.test(text)) return make("hr");
  if (ITEM.test(lines[0])) return list(lines);
  if (lines.every(line => ROW.test(line))) return table(lines);
  if (lines[0].startsWith(">")) return make("blockquote", "", ...blocks(lines.map(l => l.replace(/^>\s?/, "")).join("\n")).map(block));
  return make("p", "", ...lines.flatMap((line, i) => (i ? [make("br"), ...inline(line)] : inline(line))));
}
// Shows a text in a box; blocks that are as they were keep their nodes (and what is selected in them).
function render(box, text) {
  const wanted = blocks(text), had = box.sources ?? [];
  let same = 0;
  while (same < had.length && had[same] === wanted[same]) same++;
  while (box.childNodes.length > same) box.lastChild.remove();
  for (const source of wanted.slice(same)) box.append(block(source));
  box.sources = wanted;
}
