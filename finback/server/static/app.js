// The chat page: which conversation is shown, what is being asked, and what every button and key does.

import { element } from "./element.js";
import { copyText, download, toJson, toMarkdown } from "./export.js";
import { t, translate } from "./i18n.js";
import { AnswerView, editElement, questionElement } from "./messages.js";
import { openSettings, showBalance, showLimits, showModels, wireSettings } from "./settings.js";
import { showList } from "./sidebar.js";
import * as store from "./store.js";
import { chat, getJson, ServerError } from "./stream.js";
import { addUsage, describeUsage, priceOf, readUsage } from "./usage.js";

const SAVE_EVERY_MS = 2_000; // while an answer streams: what a reload in the middle may lose
const RETRY_MS = 2_000;
const TOAST_MS = 8_000;
const TITLE = 60; // characters of a question
const NEAR_END = 80; // pixels from the end within which the view follows the text

const $ = (id) => document.getElementById(id);

let conversations = [];
let current = store.newConversation(); // in the list from its first question on
let info = null; // what /finback/info said
let running = null; // {conversation, message, before, controller} of the answer being streamed; before it, so much was spent
let follow = true;
let storageTold = false;
let toastTimer = 0;

const settings = wireSettings((name) => {
  if (name === "language") showEverything();
  if (name === "key") {
    showBalance(settings.key);
    connect();
  }
});

// --- the server -------------------------------------------------------------------------------------------------------------

let connecting = 0;

/** Learn what the server serves; while it cannot be reached say so, and try again until it can. */
async function connect() {
  clearTimeout(connecting);
  try {
    info = await getJson("/finback/info", settings.key);
    showModels(info.models?.length ? info.models : [info.model], settings);
    showLimits(info);
    $("version").textContent = info.version ? t("version", { version: info.version }) : "";
    if (!$("offline").hidden) {
      $("offline").hidden = true;
      toast(t("back"));
    } else if (info.keys_required && !settings.key) toast(t("keyNeeded"), t("settings"), () => openSettings(settings, info));
  } catch (error) {
    if (error instanceof ServerError && error.status < 500) return toast(t("failed", { message: error.message }));
    if (!(error instanceof ServerError || error instanceof TypeError || error instanceof SyntaxError)) throw error;
    $("offline").hidden = false;
    connecting = setTimeout(connect, RETRY_MS);
  }
}

/** The earlier turns as the server takes them. Thoughts stay here, and so do answers without a word. */
function requestFor(conversation) {
  const turns = conversation.messages.filter(({ role, content }) => role === "user" || content).map(({ role, content }) => ({ role, content }));
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  return {
    model: settings.model || info?.model || "deepseek-reasoner",
    messages: [...system, ...turns],
    temperature: settings.temperature,
    ...(settings.maxTokens ? { max_tokens: settings.maxTokens } : {}),
  };
}

/** Answer the conversation's last question. The answer is a message of the conversation from its first token on. */
async function answer(conversation) {
  const request = requestFor(conversation);
  const message = { role: "assistant", content: "", reasoning: "", seconds: null, elapsed: null, model: request.model, usage: null, price: null, end: null, error: null };
  conversation.messages.push(message);
  const run = { conversation, message, before: conversation.spent, controller: new AbortController(), view: null, thinkingSince: null, clock: 0 };
  running = run;
  conversation.updated = Date.now();
  follow = true;
  showConversation();
  announce(t("announceStart"));
  save(conversation);
  run.clock = setInterval(() => run.view?.update(run.thinkingSince), 1000);
  try {
    await stream(run, request);
  } catch (error) {
    tellFailure(run, error);
  } finally {
    clearInterval(run.clock);
    endThought(run);
    running = null;
    run.view?.finish();
    save(conversation);
    refreshList();
    showControls();
    showTotal();
    announce(message.error ? run.view?.note.textContent ?? "" : t(message.end === "stopped" ? "announceStopped" : "announceDone"));
    scrollToEnd();
  }
}

async function stream(run, request) {
  const { message, controller } = run;
  const chunks = chat(request, settings.key, controller.signal);
  let first = 0;
  let saved = performance.now();
  for (;;) {
    const { done, value } = await chunks.next();
    if (done) {
      if (value) message.end ??= "stop";
      else if (!message.end) message.error = { kind: "cutOff" };
      return;
    }
    const now = performance.now();
    if (value.reasoning || value.content) first ||= now;
    if (value.reasoning) run.thinkingSince ??= now;
    if (value.content && run.thinkingSince !== null) {
      endThought(run);
      run.view?.foldThought();
    }
    message.reasoning += value.reasoning;
    message.content += value.content;
    message.end = value.end ?? message.end;
    if (first) message.elapsed = (now - first) / 1000;
    if (value.usage) {
      message.usage = readUsage(value.usage);
      message.price = priceOf(message.usage, info);
      run.conversation.spent = addUsage(run.before, message);
    }
    run.view?.update(run.thinkingSince);
    if (now - saved > SAVE_EVERY_MS) {
      saved = now;
      save(run.conversation);
    }
  }
}

/** The thought is over: its time is known. It folds where an answer follows it, and stays open where nothing does. */
function endThought(run) {
  if (run.thinkingSince === null) return;
  run.message.seconds = (run.message.seconds ?? 0) + (performance.now() - run.thinkingSince) / 1000;
  run.thinkingSince = null;
}

function tellFailure({ conversation, message, before, controller }, error) {
  if (controller.signal.aborted) message.end = "stopped";
  else if (error instanceof ServerError) {
    message.error = { kind: "refused", status: error.status, message: error.message };
    if (error.type === "server_error") {
      // Nobody pays for a failure of the server's own.
      message.usage = message.price = null;
      conversation.spent = before;
    }
  } else if (error instanceof TypeError || error instanceof SyntaxError) {
    // fetch and its stream report a lost connection as TypeError; half a line of JSON is the same thing seen later.
    message.error = { kind: message.content || message.reasoning ? "cutOff" : "unreachable" };
    connect();
  } else throw error;
}

function stop() {
  running?.controller.abort();
}

// --- conversations ----------------------------------------------------------------------------------------------------------

function save(conversation) {
  if (!conversations.includes(conversation)) return;
  conversations.sort((a, b) => b.updated - a.updated);
  const problem = store.saveConversation(conversation);
  if (problem && !storageTold) toast(t(problem === "quota" ? "quota" : "storageClosed"));
  storageTold = Boolean(problem);
}

/** The beginning of a question, cut between words where there are any. */
function titleOf(text) {
  const letters = [...text.replace(/\s+/g, " ")];
  if (letters.length <= TITLE) return letters.join("");
  const start = letters.slice(0, TITLE).join("");
  const space = start.lastIndexOf(" ");
  return `${space > TITLE / 2 ? start.slice(0, space) : start}…`;
}

/** Ask in `conversation`, which drops everything from message number `from` on. */
function ask(conversation, text, from = conversation.messages.length) {
  conversation.messages.splice(from, conversation.messages.length, { role: "user", content: text });
  conversation.title ||= titleOf(text);
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  return answer(conversation);
}

function regenerate() {
  if (running) return;
  current.messages.pop();
  answer(current);
}

function open(conversation) {
  if (running && running.conversation !== conversation) stop();
  current = conversation;
  follow = true;
  closeMenu();
  showConversation();
  refreshList();
  $("question").focus();
}

function remove(id) {
  const gone = conversations.find((each) => each.id === id);
  if (running?.conversation === gone) stop();
  conversations = conversations.filter((each) => each !== gone);
  store.deleteConversation(id);
  if (current === gone) open(conversations[0] ?? store.newConversation());
  refreshList();
  toast(t("removed", { title: gone.title }), t("undo"), () => {
    conversations.push(gone);
    conversations.sort((a, b) => b.updated - a.updated);
    store.saveConversation(gone);
    open(gone);
  });
}

function rename(id, title) {
  const conversation = conversations.find((each) => each.id === id);
  conversation.title = title;
  save(conversation);
  refreshList();
  if (conversation === current) showTitle();
  $("list").querySelector(`li[data-id="${CSS.escape(id)}"] .open`)?.focus();
}

// --- what is shown ----------------------------------------------------------------------------------------------------------

function showEverything() {
  translate(document);
  $("ideas").replaceChildren(...["idea1", "idea2", "idea3"].map((name) => element("button", { type: "button", onclick: () => fill(t(name)) }, t(name))));
  $("version").textContent = info?.version ? t("version", { version: info.version }) : "";
  showLimits(info);
  showConversation();
  refreshList();
}

function refreshList() {
  const byId = (id) => conversations.find((each) => each.id === id);
  showList($("list"), conversations, current.id, { open: (id) => open(byId(id)), rename, remove });
}

function showTitle() {
  $("title").textContent = current.title;
  document.title = current.title ? `${current.title} · finback` : "finback";
}

function showConversation() {
  const last = current.messages.length - 1;
  const lastQuestion = current.messages.findLastIndex(({ role }) => role === "user");
  const nodes = current.messages.map((message, index) => {
    if (message.role === "user") return questionElement(message, { copy, edit: index === lastQuestion ? editQuestion : null });
    const view = new AnswerView(message, { copy, regenerate: index === last ? regenerate : null }, scrollToEnd);
    if (running?.message === message) {
      running.view = view;
      view.update(running.thinkingSince);
    } else view.finish();
    return view.root;
  });
  if (running && running.conversation !== current) running.view = null;
  $("messages").replaceChildren(...nodes);
  $("empty").hidden = current.messages.length > 0;
  showTitle();
  showTotal();
  showControls();
  scrollToEnd();
}

/** While an answer is on its way nothing else can be asked: the page's style hides the buttons for it. */
function showControls() {
  const busy = running?.conversation === current;
  document.body.classList.toggle("busy", busy);
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("send").disabled = !$("question").value.trim();
}

function showTotal() {
  const { spent } = current;
  $("total").textContent = spent ? t("total", { usage: describeUsage({ ...spent.usage, thought: 0 }, spent.price) }) : "";
}

function editQuestion(message) {
  if (running) return;
  const index = current.messages.indexOf(message);
  const article = $("messages").children[index];
  const { form, field } = editElement(message, (text) => ask(current, text, index), showConversation);
  article.replaceChildren(form);
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

async function copy(text, button) {
  const copied = await copyText(text);
  announce(t(copied ? "copied" : "copyFailed"));
  if (!copied) return toast(t("copyFailed"));
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
}

function announce(text) {
  $("announce").textContent = text;
}

function toast(text, actionName = "", action = null) {
  clearTimeout(toastTimer);
  $("toast-text").textContent = text;
  $("toast-action").hidden = !action;
  $("toast-action").textContent = actionName;
  $("toast-action").onclick = () => {
    $("toast").hidden = true;
    action();
  };
  $("toast").hidden = false;
  toastTimer = setTimeout(() => ($("toast").hidden = true), TOAST_MS);
}

function scrollToEnd(force = false) {
  const box = $("scroll");
  if (follow || force) box.scrollTop = box.scrollHeight;
  showLatest();
}

function showLatest() {
  const box = $("scroll");
  $("latest").hidden = box.scrollHeight - box.scrollTop - box.clientHeight < 2 * NEAR_END;
}

// --- buttons and keys -------------------------------------------------------------------------------------------------------

function fill(text) {
  $("question").value = text;
  fitQuestion();
  $("question").focus();
}

function fitQuestion() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 220)}px`;
  showControls();
}

function openMenu() {
  document.body.classList.add("menu");
  $("scrim").hidden = false;
  $("open-menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeMenu() {
  if (!document.body.classList.contains("menu")) return;
  document.body.classList.remove("menu");
  $("scrim").hidden = true;
  $("open-menu").setAttribute("aria-expanded", "false");
  $("open-menu").focus();
}

function exportAs(extension, type, text) {
  download(current.title, extension, type, text);
  $("export-dialog").close();
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("question").value.trim();
    if (!text || running) return;
    $("question").value = "";
    fitQuestion();
    ask(current, text);
  });
  $("question").addEventListener("input", fitQuestion);
  $("question").addEventListener("keydown", (event) => {
    // An Enter that only confirms a Chinese input method's choice must not send.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    $("composer").requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("menu")) closeMenu();
    else if (running) {
      stop();
      $("question").focus();
    }
  });
  $("stop").addEventListener("click", () => {
    stop();
    $("question").focus();
  });
  $("new").addEventListener("click", () => open(store.newConversation()));
  $("open-menu").addEventListener("click", openMenu);
  $("close-menu").addEventListener("click", closeMenu);
  $("scrim").addEventListener("click", closeMenu);
  $("settings-open").addEventListener("click", () => openSettings(settings, info));
  $("export").addEventListener("click", () => (current.messages.length ? $("export-dialog").showModal() : toast(t("nothingToExport"))));
  $("export-markdown").addEventListener("click", () => exportAs("md", "text/markdown", toMarkdown(current)));
  $("export-json").addEventListener("click", () => exportAs("json", "application/json", toJson(current)));
  $("latest").addEventListener("click", () => {
    follow = true;
    scrollToEnd();
  });
  $("scroll").addEventListener("scroll", () => {
    const box = $("scroll");
    follow = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
    showLatest();
  });
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  $("messages").addEventListener("click", (event) => {
    const button = event.target.closest(".copy-code");
    if (button) copy(button.closest(".code").querySelector("code").textContent, button);
    // Who opens a thought reads it from its beginning: the view does not run to the end of the text then.
    const thought = event.target.closest(".thought summary")?.parentElement;
    if (thought && !thought.open) follow = false;
  });
  window.addEventListener("storage", (event) => takeFromOtherTab(store.conversationOf(event.key)));
  window.addEventListener("pagehide", () => running && save(running.conversation));
}

/** Another tab saved or deleted a conversation: show what it is now, unless this tab is answering in it. */
function takeFromOtherTab(id) {
  if (!id || running?.conversation.id === id) return;
  const theirs = store.loadConversation(id);
  conversations = conversations.filter((each) => each.id !== id);
  if (theirs) conversations.push(theirs);
  conversations.sort((a, b) => b.updated - a.updated);
  if (current.id === id) {
    current = theirs ?? store.newConversation();
    showConversation();
  }
  refreshList();
}

function start() {
  const stored = store.loadConversations();
  conversations = stored.conversations;
  current = conversations[0] ?? current;
  wire();
  showEverything();
  if (stored.broken) toast(t("storageBroken"));
  $("question").focus();
  connect();
}

start();
