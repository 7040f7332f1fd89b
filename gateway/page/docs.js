// Shows /openapi.json, and sends requests to its operations. No framework, no foreign request.

const $ = (id) => document.getElementById(id);

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text != null) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

const api = await (await fetch("/openapi.json")).json();
const resolve = (schema) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema) || {};

/** A schema in one line: its type, or the names of its fields. */
function shape(given, depth = 0) {
  const schema = resolve(given);
  const choices = schema.oneOf || schema.anyOf;
  if (choices) return choices.map((one) => shape(one, depth)).join(" | ");
  if (schema.allOf) return schema.allOf.map((one) => shape(one, depth)).join(" & ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  const type = [].concat(schema.type || "any").join(" | ");
  if (type.startsWith("array")) return `[${shape(schema.items, depth + 1)}, …]`;
  if (!schema.properties) return schema.format ? `${type} (${schema.format})` : type;
  if (depth > 2) return "{…}";
  const fields = Object.entries(schema.properties).map(([name, field]) =>
    `${name}${(schema.required || []).includes(name) ? "" : "?"}: ${shape(field, depth + 1)}`);
  return `{ ${fields.join(", ")} }`;
}

function table(caption, heads, rows) {
  const made = element("table");
  made.append(element("caption", caption, "muted"));
  const head = made.createTHead().insertRow();
  for (const text of heads) {
    const cell = element("th", text);
    cell.scope = "col";
    head.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const text of row) line.append(element("td", text));
  }
  return made;
}

/** The form that sends a request. */
function trial(method, path, operation) {
  const form = element("form", null, "trial");
  const name = `${method}-${path}`.replace(/\W+/g, "-");
  const fields = (operation.parameters || []).filter((one) => one.in === "query").map((parameter) => {
    const label = element("label", `${parameter.name} `);
    const input = element("input");
    input.id = `${name}-${parameter.name}`;
    input.size = 12;
    label.append(input);
    form.append(label, " ");
    return [parameter.name, input];
  });
  let file;
  if (operation.requestBody) {
    const label = element("label", "Body (a file) ");
    file = element("input");
    file.type = "file";
    label.append(file);
    form.append(label, " ");
  }
  const send = element("button", "Send");
  send.type = "submit";
  const out = element("pre", null, "curl");
  out.hidden = true;
  out.tabIndex = 0;
  out.setAttribute("aria-label", `Response of ${method.toUpperCase()} ${path}`);
  out.setAttribute("role", "region");
  form.append(send, out);
  form.onsubmit = async (event) => {
    event.preventDefault();
    const query = new URLSearchParams(fields.filter(([, input]) => input.value).map(([key, input]) => [key, input.value]));
    const token = $("token").value.trim();
    const since = performance.now();
    out.hidden = false;
    try {
      const response = await fetch(path + (query.size ? `?${query}` : ""), {
        method: method.toUpperCase(),
        body: file?.files[0],
        headers: token ? { authorization: `Bearer ${token}` } : {},
        signal: AbortSignal.timeout(10_000),
      });
      const text = await response.text();
      const took = Math.round(performance.now() - since);
      out.textContent = `${response.status} ${response.statusText}, ${took} ms\n${text.slice(0, 20_000)}`;
    } catch (error) {
      out.textContent = String(error);
    }
  };
  return form;
}

$("version").textContent = api.info.version;
$("about").textContent = api.info.description;
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const card = element("section", null, "card");
    const title = element("h2", `${method.toUpperCase()} ${path}`);
    title.id = operation.operationId;
    card.setAttribute("aria-labelledby", title.id);
    card.append(title, element("p", operation.summary));
    if (operation.description) card.append(element("p", operation.description, "muted"));
    if (operation.parameters) {
      card.append(table("Parameters", ["Name", "In", "Type", "Meaning"], operation.parameters.map((one) =>
        [one.name, one.in, shape(one.schema), one.description || ""])));
    }
    if (operation.requestBody) {
      card.append(table("Body", ["Content type", "Form"], Object.entries(operation.requestBody.content).map(([type, one]) =>
        [type, shape(one.schema)])));
    }
    card.append(table("Responses", ["Status", "Meaning", "Form"], Object.entries(operation.responses).map(([status, one]) =>
      [status, one.description, Object.values(one.content || {}).map((content) => shape(content.schema)).join(" or ")])));
    card.append(trial(method, path, operation));
    $("operations").append(card);
  }
}
