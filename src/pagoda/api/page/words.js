// What the page says, in English and Chinese.
const WORDS = {
  en: {
    settings: "Settings", live: "Live", language: "中文", theme: "Light or dark", model: "model's own", system: "System prompt",
    systemHint: "What the model should be and do", temperature: "Temperature", maxTokens: "Longest answer, tokens",
    rest: "what fits", seed: "Seed", random: "random", thinking: "Thinking", asModel: "model's own", on: "on", off: "off",
    key: "API key", keyHint: "if it needs one", greeting: "What would you like to know?", ask: "Ask anything",
    send: "Send", stop: "Stop", fresh: "New chat", keys: "Enter sends, Shift+Enter starts a line, Esc stops",
    program: "From a program", routes: "all routes", copy: "Copy", copied: "Copied", again: "Again", edit: "Edit",
    thinkingNow: "Thinking …", thought: s => `Thought for ${s} s`, tokens: "tokens", first: "first token",
    ready: "ready", notReachable: "not reachable", lost: "The connection to the server was lost before the answer was complete.", needsKey: "needs an API key: it is typed under Settings",
    rate: "Tokens per second", queue: "Running / waiting", cache: "Cache in use", latency: "Time per token",
    context: "Context", served: "Models", architecture: "Architecture", restarts: "Engine restarts", hits: "Prefix cache hits",
    preemptions: "Preemptions", generated: "Tokens generated", addPicture: "Add a picture", remove: "Remove this picture", picture: "Picture",
    cut: "cut at the longest answer", noChat: "This model answers no chats: it makes vectors or scores. Live shows how to ask it.",
    ideas: ["Explain how a pagoda withstands earthquakes", "Write a haiku about rain", "Sort a list in Python, with an example"],
  },
  zh: {
    settings: "设置", live: "状态", language: "English", theme: "明暗", model: "模型默认", system: "系统提示词",
    systemHint: "希望模型扮演什么、做什么", temperature: "温度", maxTokens: "回答上限（token）",
    rest: "不限", seed: "随机种子", random: "随机", thinking: "思考", asModel: "模型默认", on: "开", off: "关",
    key: "API 密钥", keyHint: "服务器要求时填写", greeting: "想了解什么？", ask: "输入问题",
    send: "发送", stop: "停止", fresh: "新对话", keys: "Enter 发送，Shift+Enter 换行，Esc 停止",
    program: "在程序中调用", routes: "全部接口", copy: "复制", copied: "已复制", again: "重新回答", edit: "编辑",
    thinkingNow: "思考中……", thought: s => `思考了 ${s} 秒`, tokens: "token", first: "首 token",
    ready: "就绪", notReachable: "无法连接", lost: "回答尚未完成，与服务器的连接就中断了。", needsKey: "需要 API 密钥：请在“设置”中填写",
    rate: "每秒 token 数", queue: "运行 / 排队", cache: "缓存占用", latency: "每 token 用时",
    context: "上下文", served: "模型", architecture: "架构", restarts: "引擎重启次数", hits: "前缀缓存命中",
    preemptions: "抢占次数", generated: "已生成 token", addPicture: "添加图片", remove: "移除这张图片", picture: "图片",
    cut: "已达回答上限", noChat: "该模型不能对话，只生成向量或分数。“状态”里有调用示例。",
    ideas: ["解释一下宝塔为什么能抗震", "写一首关于雨的俳句", "用 Python 给列表排序，并举例"],
  },
};
const settings = {
  get: name => { try { return localStorage.getItem("pagoda." + name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem("pagoda." + name, value); return true; } catch { return false; } }, // full, or a private window
};
let language = settings.get("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const say = (name, ...values) => {
  const word = WORDS[language][name];
  return typeof word === "function" ? word(...values) : word;
};
function sayAll() {
  document.documentElement.lang = language;
  for (const each of document.querySelectorAll("[data-say]")) each.textContent = say(each.dataset.say);
  for (const each of document.querySelectorAll("[data-hint]")) each.placeholder = say(each.dataset.hint);
  for (const each of document.querySelectorAll("[data-label]")) each.setAttribute("aria-label", say(each.dataset.label));
}
