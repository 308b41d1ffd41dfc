// The list of conversations: choose, rename, delete.

import { t } from "./i18n.js";
import { element } from "./element.js";
import { iconButton } from "./messages.js";

/** Show `conversations` in `list`; `actions` are {open(id), rename(id, title), remove(id)}. */
export function showList(list, conversations, currentId, actions) {
  const focused = list.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
  list.replaceChildren(...conversations.map((conversation) => row(conversation, conversation.id === currentId, actions)));
  if (focused) list.querySelector(`li[data-id="${CSS.escape(focused)}"] .open`)?.focus();
}

function row(conversation, current, actions) {
  const title = conversation.title || t("newChat");
  const open = element("button", { type: "button", className: "open", title, onclick: () => actions.open(conversation.id) }, title);
  if (current) open.setAttribute("aria-current", "true");
  const item = element("li", {}, open);
  item.dataset.id = conversation.id;
  item.append(
    iconButton("edit", t("rename", { title }), () => editRow(item, conversation, actions)),
    iconButton("trash", t("remove", { title }), () => actions.remove(conversation.id)),
  );
  return item;
}

function editRow(item, conversation, actions) {
  const field = element("input", { type: "text", value: conversation.title, maxLength: 200, "aria-label": t("renameField") });
  let open = true;
  const close = (title) => {
    if (!open) return; // removing the field from the page blurs it once more
    open = false;
    actions.rename(conversation.id, title);
  };
  field.addEventListener("blur", () => close(field.value.trim() || conversation.title));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
    event.preventDefault();
    event.stopPropagation();
    close((event.key === "Enter" && field.value.trim()) || conversation.title);
  });
  item.replaceChildren(field);
  field.focus();
  field.select();
}
