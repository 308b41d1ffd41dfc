// Every string that the page shows, in English and Chinese, and the numbers and times around them.

export const STRINGS = {
  en: {
    skip: "Skip to the question",
    conversations: "Conversations",
    newChat: "New chat",
    openMenu: "Open the list of conversations",
    closeMenu: "Close the list of conversations",
    rename: "Rename “{title}”",
    renameField: "New name",
    remove: "Delete “{title}”",
    removed: "“{title}” deleted",
    undo: "Undo",
    model: "Model",
    settings: "Settings",
    close: "Close",
    export: "Export conversation",
    exportHelp: "Markdown is for reading; JSON keeps everything, thoughts and token counts included.",
    nothingToExport: "There is nothing to export yet",
    welcome: "What shall we think about?",
    idea1: "Prove that √2 is irrational",
    idea2: "Write quicksort in Python, with tests",
    idea3: "How many people must meet for two to likely share a birthday?",
    question: "Your question",
    placeholder: "Ask anything",
    send: "Send",
    stop: "Stop the answer",
    latest: "Scroll to the latest text",
    you: "You",
    assistant: "Assistant",
    thinking: "Thinking…",
    thinkingFor: "Thinking for {seconds} s",
    thoughtFor: "Thought for {seconds} s",
    waiting: "Waiting for the first token",
    copy: "Copy",
    copied: "Copied",
    copyFailed: "The browser did not allow copying",
    copyCode: "Copy code",
    regenerate: "Answer again",
    editQuestion: "Edit and ask again",
    cancel: "Cancel",
    ask: "Ask",
    stopped: "You stopped this answer.",
    lengthEnd: "The answer reached the token limit.",
    cutOff: "The connection ended before the answer did.",
    unreachable: "The server cannot be reached. Your question is kept; ask again when it is back.",
    offline: "The server cannot be reached. Trying again…",
    back: "The server is back",
    failed: "The server refused: {message}",
    failedKey: "The server does not accept this API key ({message}). Enter one in the settings.",
    failedBalance: "The balance of this API key is spent ({message}).",
    failedBusy: "The server is busy ({message}). Wait a moment and ask again.",
    retry: "Ask again",
    announceStart: "The answer is coming",
    announceDone: "The answer is complete",
    announceStopped: "The answer was stopped",
    temperature: "Temperature",
    temperatureHelp: "0 always takes the likeliest token; 0.6 is advised for reasoning.",
    maxTokens: "Most tokens per answer",
    maxTokensHelp: "Thought and answer together; the context holds {context}.",
    serverDefault: "Server’s default",
    system: "System prompt",
    none: "None",
    key: "API key",
    keyHelp: "Needed only where the server asks for one. Forgotten when this tab closes.",
    keyNeeded: "This server asks for an API key",
    balance: "Balance: {amount}",
    theme: "Theme",
    themeSystem: "As the system",
    themeLight: "Light",
    themeDark: "Dark",
    language: "Language",
    languageBrowser: "As the browser",
    usage: "{input} in · {output} out",
    usageCached: "{input} in ({cached} cached) · {output} out",
    usageThought: "{thought} thought",
    speed: "{rate} tokens/s",
    total: "This conversation: {usage}",
    quota: "The browser’s storage is full: this conversation will not survive a reload. Export it, or delete old ones.",
    storageClosed: "The browser does not let this page store anything: conversations will not survive a reload.",
    storageBroken: "A stored conversation could not be read and was left out.",
    imageLink: "Image: {text}",
    version: "Version {version}",
  },
  zh: {
    skip: "跳到提问框",
    conversations: "对话列表",
    newChat: "新对话",
    openMenu: "打开对话列表",
    closeMenu: "关闭对话列表",
    rename: "重命名“{title}”",
    renameField: "新名称",
    remove: "删除“{title}”",
    removed: "已删除“{title}”",
    undo: "撤销",
    model: "模型",
    settings: "设置",
    close: "关闭",
    export: "导出对话",
    exportHelp: "Markdown 便于阅读；JSON 保留全部内容，包括思考过程和用量。",
    nothingToExport: "还没有可导出的内容",
    welcome: "想一起思考什么？",
    idea1: "证明 √2 是无理数",
    idea2: "用 Python 写快速排序，并附上测试",
    idea3: "至少多少人相聚，才很可能有两人同一天生日？",
    question: "你的问题",
    placeholder: "随便问点什么",
    send: "发送",
    stop: "停止回答",
    latest: "滚动到最新内容",
    you: "你",
    assistant: "助手",
    thinking: "思考中…",
    thinkingFor: "已思考 {seconds} 秒",
    thoughtFor: "思考了 {seconds} 秒",
    waiting: "正在等待首个 token",
    copy: "复制",
    copied: "已复制",
    copyFailed: "浏览器不允许复制",
    copyCode: "复制代码",
    regenerate: "重新回答",
    editQuestion: "修改并重新提问",
    cancel: "取消",
    ask: "提问",
    stopped: "你停止了这次回答。",
    lengthEnd: "回答达到了 token 上限。",
    cutOff: "回答尚未结束，连接已中断。",
    unreachable: "无法连接服务器。问题已保留，恢复后可重新提问。",
    offline: "无法连接服务器，正在重试…",
    back: "服务器已恢复",
    failed: "服务器拒绝了请求：{message}",
    failedKey: "服务器不接受此 API 密钥（{message}）。请在设置中填写。",
    failedBalance: "此 API 密钥的余额已用完（{message}）。",
    failedBusy: "服务器繁忙（{message}）。请稍后再问。",
    retry: "重新提问",
    announceStart: "开始回答",
    announceDone: "回答完毕",
    announceStopped: "回答已停止",
    temperature: "温度",
    temperatureHelp: "0 总是选取概率最高的 token；推理建议用 0.6。",
    maxTokens: "单次回答的 token 上限",
    maxTokensHelp: "思考与回答合计；上下文长度为 {context}。",
    serverDefault: "服务器默认值",
    system: "系统提示词",
    none: "无",
    key: "API 密钥",
    keyHelp: "仅在服务器要求时填写；关闭此标签页后即清除。",
    keyNeeded: "此服务器需要 API 密钥",
    balance: "余额：{amount}",
    theme: "主题",
    themeSystem: "跟随系统",
    themeLight: "浅色",
    themeDark: "深色",
    language: "语言",
    languageBrowser: "跟随浏览器",
    usage: "输入 {input} · 输出 {output}",
    usageCached: "输入 {input}（缓存命中 {cached}）· 输出 {output}",
    usageThought: "思考 {thought}",
    speed: "{rate} token/秒",
    total: "本次对话：{usage}",
    quota: "浏览器存储空间已满：刷新后此对话将丢失。请导出，或删除旧对话。",
    storageClosed: "浏览器不允许此页面存储数据：刷新后对话将丢失。",
    storageBroken: "有一个已存的对话无法读取，已略过。",
    imageLink: "图片：{text}",
    version: "版本 {version}",
  },
};

/** The language in use is the document's own: "en" or "zh". */
export function language() {
  return document.documentElement.lang === "zh" ? "zh" : "en";
}

/** `choice` is "en", "zh" or "" for the browser's own. */
export function setLanguage(choice) {
  document.documentElement.lang = (choice || navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** The string named `name` with its {fields} filled in; a name that is not in the table is a mistake of the page's author. */
export function t(name, fields = {}) {
  const text = STRINGS[language()][name];
  if (text === undefined) throw new Error(`no string is named ${name}`);
  return text.replace(/\{(\w+)\}/g, (_, field) => String(fields[field]));
}

/** Write the strings into everything under `root` that names one: text, accessible name (and tooltip), placeholder. */
export function translate(root) {
  for (const node of root.querySelectorAll("[data-i18n]")) node.textContent = t(node.dataset.i18n);
  for (const node of root.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", t(node.dataset.i18nLabel));
    if (node.tagName === "BUTTON") node.title = t(node.dataset.i18nLabel);
  }
  for (const node of root.querySelectorAll("[data-i18n-placeholder]")) node.placeholder = t(node.dataset.i18nPlaceholder);
}

/** 12345 as "12,345". */
export function count(number) {
  return Number(number).toLocaleString(language() === "zh" ? "zh-CN" : "en-US");
}

/** Seconds with one decimal below a minute, whole ones above. */
export function seconds(value) {
  return value < 60 ? value.toFixed(1) : String(Math.round(value));
}
