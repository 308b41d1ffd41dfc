// The API's page: every operation of /openapi.json with its fields, written by this server alone. Nothing is fetched from elsewhere.

import { element } from "./element.js";

const $ = (id) => document.getElementById(id);

let schemas = {};

function resolve(schema) {
  return schema?.$ref ? schemas[schema.$ref.split("/").pop()] : schema ?? {};
}

/** A type in few words: "text", "whole number 1 to 16", "list of Message", "text or list of Part". */
function typeOf(schema) {
  if (schema.$ref) return nameOf(schema.$ref);
  if (schema.anyOf) return schema.anyOf.filter(({ type }) => type !== "null").map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  const words = { string: "text", integer: "whole number", number: "number", boolean: "true or false", object: "object" };
  return `${words[schema.type] ?? "anything"}${rangeOf(schema)}`;
}

function rangeOf({ minimum, exclusiveMinimum, maximum }) {
  const least = minimum ?? exclusiveMinimum;
  if (least === undefined && maximum === undefined) return "";
  const from = minimum !== undefined ? `at least ${minimum}` : exclusiveMinimum !== undefined ? `above ${exclusiveMinimum}` : "";
  return ` ${[from, maximum !== undefined ? `at most ${maximum}` : ""].filter(Boolean).join(", ")}`;
}

function nameOf(reference) {
  return reference.split("/").pop().split("__").pop();
}

/** The fields of an object as a table, and below it those of the objects that it names, each once. */
function fieldsOf(schema, seen = new Set()) {
  const { properties = {}, required = [] } = schema;
  const rows = Object.entries(properties).map(([name, field]) =>
    element("tr", {}, element("td", {}, element("code", {}, name)), element("td", {}, typeOf(field)), element("td", {}, required.includes(name) ? "required" : "")),
  );
  const tables = rows.length ? [element("div", { className: "table", tabIndex: 0 }, element("table", {}, element("tbody", {}, ...rows)))] : [];
  for (const reference of referencesOf(properties)) {
    if (seen.has(reference)) continue;
    seen.add(reference);
    tables.push(element("h3", {}, nameOf(reference)), ...fieldsOf(resolve({ $ref: reference }), seen));
  }
  return tables;
}

function referencesOf(value) {
  if (typeof value !== "object" || value === null) return [];
  return value.$ref ? [value.$ref] : Object.values(value).flatMap(referencesOf);
}

function operation(path, method, { description = "", requestBody, responses }) {
  const body = requestBody?.content?.["application/json"]?.schema;
  const statuses = Object.entries(responses).map(([status, { description: words }]) => `${status} ${words}`);
  return element(
    "details",
    {},
    element("summary", {}, element("code", {}, `${method.toUpperCase()} ${path}`), element("span", {}, description)),
    ...(body ? fieldsOf(resolve(body)) : []),
    element("p", { className: "help" }, statuses.join(" · ")),
  );
}

async function show() {
  const body = JSON.stringify({ model: "deepseek-reasoner", messages: [{ role: "user", content: "What is 3+8-7+5?" }] });
  $("example").textContent = `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json' -d '${body}'`;
  const response = await fetch("/openapi.json");
  const { paths, components } = await response.json();
  schemas = components.schemas;
  const found = Object.entries(paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, what]) => operation(path, method, what)));
  $("operations").replaceChildren(...found);
}

show();
