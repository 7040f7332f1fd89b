// The page: drawing, and the live overview. No framework, no build step, no foreign request.

const $ = (id) => document.getElementById(id);
let token = sessionStorage.getItem("token") || "";
const authorized = () => (token ? { authorization: `Bearer ${token}` } : {});

// Numbers as people read them.

const grouped = (n) => Math.round(n).toLocaleString("en-US");
const time = (us) => {
  if (us == null) return "–";
  if (us < 1000) return `${us < 10 ? us.toFixed(1) : Math.round(us)} µs`;
  if (us < 1e6) return `${(us / 1000).toPrecision(3)} ms`;
  return long(us / 1e6);
};
const long = (s) => {
  if (s < 1) return `${grouped(s * 1000)} ms`;
  if (s < 60) return `${s.toPrecision(3)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
};
const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < 4) { bytes /= 1024; unit += 1; }
  return `${unit ? bytes.toPrecision(3) : bytes} ${units[unit]}`;
};

// Theme.

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
};

// Token.

function askForToken(text) {
  $("token-form").hidden = false;
  $("token-error").textContent = text || "";
  $("token").focus();
}
$("token-form").onsubmit = (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("token", token);
  $("token-form").hidden = true;
  watch();
};

// The live overview.

let points = [];
let watching = 0;

async function watch() {
  const mine = ++watching;
  for (let pause = 500; mine === watching; pause = Math.min(pause * 2, 10_000)) {
    try {
      const first = await fetch("/v1/overview", { headers: authorized() });
      if (first.status === 401) return askForToken(token ? "This token is wrong." : "");
      if (!first.ok) throw new Error((await first.json()).detail);
      const overview = await first.json();
      points = overview.series || [];
      show(overview);
      showProxied().catch(console.debug);
      pause = 500;
      const stream = await fetch("/v1/overview?watch", { headers: authorized() });
      const reader = stream.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ""; mine === watching;) {
        const { value, done } = await reader.read();
        if (done) break;
        const events = (text + value).split("\n\n");
        text = events.pop();
        for (const event of events) if (event.startsWith("data:")) show(JSON.parse(event.slice(5)));
      }
    } catch (error) {
      console.debug(error);
    }
    if (mine === watching) lost();
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

// The models behind a proxy.

async function showProxied() {
  const reply = await fetch("/v1/models", { headers: authorized() });
  if (!reply.ok) return;
  const models = (await reply.json()).proxied || [];
  $("proxied").hidden = models.length === 0;
  $("proxied-rows").replaceChildren(...models.map((model) => {
    const { rows, changed } = model;
    const greatest = rows.greatest_difference;
    const apart = !rows.disagreements ? "all equal"
      : `${grouped(rows.disagreements)} differ${greatest == null ? "" : `, by ${greatest.toPrecision(2)} at most`}`;
    const cells = [
      model.version ? `${model.name} (version ${model.version})` : model.name,
      model.refusal ? `not stored: ${model.refusal}` : `${grouped(model.row_hits)} of ${grouped(model.asked_rows)} rows`,
      rows.mode === "whole" ? "whole batches" : rows.verdict,
      rows.mode === "whole" ? "not probed" : `${rows.probes} probes, ${rows.audits} audits, ${grouped(rows.compared)} rows: ${apart}`,
      `${model.epoch}`,
      changed ? `${changed.why}, ${long(changed.ago_s)} ago` : "none",
    ];
    const line = document.createElement("tr");
    line.append(...cells.map((text, column) => {
      const cell = document.createElement(column === 0 ? "th" : "td");
      if (column === 0) cell.scope = "row";
      cell.textContent = text;
      return cell;
    }));
    return line;
  }));
}

let last = 0;
function lost() {
  document.body.classList.add("stale");
  const ago = last ? `Last update ${Math.round((Date.now() - last) / 1000)} s ago, reconnecting` : "Reconnecting";
  $("live").className = "state degraded";
  $("live-text").textContent = ago;
}

function show(now) {
  last = Date.now();
  document.body.classList.remove("stale");
  const point = { t: now.uptime_s, hits: now.hits, misses: now.misses, coalesced: now.coalesced };
  const before = points.at(-1);
  if (!before || point.t > before.t) points.push(point);
  while (points.length > 900) points.shift();
  $("version").textContent = `${now.version}, up ${long(now.uptime_s)}`;
  $("live").className = `state ${now.state}`;
  $("live-text").textContent = now.state === "serving" ? "Serving" : "Degraded";
  $("trouble").hidden = !now.trouble;
  $("trouble").textContent = now.trouble || "";
  $("t-ratio").textContent = now.hit_ratio == null ? "–" : `${(now.hit_ratio * 100).toFixed(1)} %`;
  $("t-saved").textContent = long(now.saved_s);
  $("t-rate").textContent = grouped(rate(points.length - 1));
  $("t-hit").textContent = time(now.latency_us.hit?.p50);
  for (const kind of ["hit", "miss"]) {
    $(`l-${kind}50`).textContent = time(now.latency_us[kind]?.p50);
    $(`l-${kind}99`).textContent = time(now.latency_us[kind]?.p99);
  }
  const model = now.model;
  const hasDigest = model && !/^0*$/.test(model.digest);
  $("m-digest").textContent = hasDigest ? `${model.digest.slice(0, 16)}…` : model?.name || "not known";
  $("m-digest-name").textContent = model && !hasDigest ? "Servers" : "Digest";
  $("m-input").textContent = model?.input.length ? `${model.input.join(" × ")} bytes` : "any";
  $("m-classes").textContent = model?.classes || "–";
  $("m-saved").textContent = long(now.saved_model_s);
  $("s-kind").textContent = now.store.kind;
  $("s-entries").textContent = grouped(now.store.entries);
  $("s-bytes").textContent = size(now.store.bytes);
  $("s-evictions").textContent = grouped(now.store.evictions);
  const isSquare = model && model.input.length === 2 && model.input[0] === model.input[1] && model.classes > 0;
  $("try").hidden = !isSquare;
  $("empty").hidden = now.requests > 0;
  $("empty").textContent = isSquare ? "No request yet. Draw a digit, or send one:" : "No request yet.";
  $("curl").hidden = now.requests > 0 || !isSquare;
  // The page sees no inputs of a foreign model.
  $("recent-card").hidden = !isSquare;
  $("chart").toggleAttribute("hidden", now.requests === 0);
  if (now.requests === 0) $("curl").textContent = `curl --data-binary @seven.png ${location.origin}/v1/classify`;
  chart(now);
  // A proxy has no digest of its own. Every fifth second is enough for its models.
  if (model && !hasDigest && now.uptime_s % 5 === 0) showProxied().catch(console.debug);
}

const total = (point) => point.hits + point.misses + point.coalesced;

/** Requests a second up to the point with this index. */
function rate(at) {
  const [a, b] = [points[at - 1], points[at]];
  return a && b && b.t > a.t ? Math.max(0, total(b) - total(a)) / (b.t - a.t) : 0;
}

function chart(now) {
  // Steps of five seconds keep the chart calm.
  const step = 5;
  const rows = [];
  for (let i = Math.max(step, points.length % step); i < points.length; i += step) {
    const [a, b] = [points[i - step], points[i]];
    const seconds = Math.max(1, b.t - a.t);
    const grown = (key) => Math.max(0, b[key] - a[key]) / seconds;
    rows.push({ t: b.t, hits: grown("hits"), coalesced: grown("coalesced"), misses: grown("misses") });
  }
  const top = Math.max(1, ...rows.map(total));
  const x = (t) => Math.max(0, 900 - (now.uptime_s - t));
  const paths = [["misses", "miss"], ["coalesced", "coalesced"], ["hits", "hit"]].map(([key, name], layer, layers) => {
    const bars = rows.map((row) => {
      const below = layers.slice(0, layer).reduce((sum, [lower]) => sum + row[lower], 0);
      const [bottom, height] = [158 - (below / top) * 150, (row[key] / top) * 150];
      return height > 0 ? `M${x(row.t) - step},${bottom.toFixed(1)}v${-height.toFixed(1)}h${step - 0.6}v${height.toFixed(1)}z` : "";
    });
    return `<path class="area-${name}" d="${bars.join("")}"/>`;
  });
  $("chart").innerHTML = paths.join("");
  $("chart-text").textContent = now.requests
    ? `${grouped(now.requests)} requests since the start; at most ${grouped(top)} a second in this time.`
    : "";
}

// Drawing.

const canvas = $("canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
let drawn = false;
let current = null;

function clear() {
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.lineWidth = 22;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = "#000";
  drawn = false;
  current = null;
  $("again").disabled = true;
  $("answer").textContent = "Draw here, or drop an image.";
  $("how").textContent = "";
  $("scores").textContent = "";
  $("seen").getContext("2d").clearRect(0, 0, 28, 28);
}

let stroke = null;
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
function line(from, to) {
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(to[0], to[1] + 0.01);
  pen.stroke();
  drawn = true;
  soon();
}
canvas.onpointerdown = (event) => {
  if (!drawn) clear();
  canvas.setPointerCapture(event.pointerId);
  stroke = place(event);
  line(stroke, stroke);
};
canvas.onpointermove = (event) => {
  if (!stroke) return;
  const to = place(event);
  line(stroke, to);
  stroke = to;
};
canvas.onpointerup = canvas.onpointercancel = () => { stroke = null; };

// With the keyboard: arrows move a cursor, and draw while space has been pressed.
let cursor = [140, 140];
let inking = false;
canvas.onkeydown = (event) => {
  const moves = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] };
  if (event.key === " ") {
    inking = !inking;
    if (inking) line(cursor, cursor);
    $("how").textContent = inking ? "Drawing. Space lifts the pen." : "Pen lifted. Space draws.";
  } else if (moves[event.key]) {
    const to = cursor.map((at, axis) => Math.min(269, Math.max(11, at + moves[event.key][axis])));
    if (inking) line(cursor, to);
    cursor = to;
  } else if (event.key === "Delete" || event.key === "Backspace") {
    clear();
  } else return;
  event.preventDefault();
};

$("clear").onclick = clear;
$("again").onclick = () => current && ask(current);
$("sample").onclick = () => {
  clear();
  line([75, 70], [205, 70]);
  line([205, 70], [125, 225]);
};

// Pictures that are opened or dropped are shown in the drawing area and sent as they are.
async function open(file) {
  clear();
  current = file;
  try {
    const picture = await createImageBitmap(file);
    const scale = Math.min(280 / picture.width, 280 / picture.height);
    const [w, h] = [picture.width * scale, picture.height * scale];
    pen.drawImage(picture, (280 - w) / 2, (280 - h) / 2, w, h);
  } catch { /* The browser cannot show it; the server may still read it. */ }
  ask(file);
}
$("file").onchange = (event) => { if (event.target.files[0]) open(event.target.files[0]); event.target.value = ""; };
canvas.ondragover = (event) => { event.preventDefault(); canvas.classList.add("over"); };
canvas.ondragleave = () => canvas.classList.remove("over");
canvas.ondrop = (event) => {
  event.preventDefault();
  canvas.classList.remove("over");
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
};

// Asking: while a question is out, only the newest drawing waits.

let busy = false;
let waiting = false;
function soon() {
  if (busy) { waiting = true; return; }
  busy = true;
  canvas.toBlob(async (picture) => {
    current = picture;
    await ask(picture);
    busy = false;
    if (waiting) { waiting = false; soon(); }
  });
}

async function ask(picture) {
  const since = performance.now();
  let response, answer;
  try {
    response = await fetch("/v1/classify?scores=true&input=true", { method: "POST", body: picture, headers: authorized() });
    answer = await response.json();
  } catch {
    $("answer").textContent = "The gateway cannot be reached.";
    return;
  }
  const took = (performance.now() - since) * 1000;
  if (response.status === 401) return askForToken(token ? "This token is wrong." : "");
  if (!response.ok) {
    $("answer").textContent = answer.detail || response.statusText;
    return;
  }
  $("again").disabled = false;
  const words = { hit: "from the store", miss: "computed", coalesced: "computed once for several requests" };
  $("answer").replaceChildren(element("b", answer.label), " ", element("span", words[answer.origin], `badge ${answer.origin}`));
  const network = Math.max(0, took - answer.time_us);
  $("how").textContent = `Answered in ${time(answer.time_us)}; network, browser and picture took ${time(network)} more.`;
  scores(answer);
  const input = Uint8Array.from(atob(answer.input), (c) => c.charCodeAt(0));
  pixels($("seen"), input);
  remember(answer, input);
}

function element(name, text, kind) {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function pixels(target, input) {
  const side = Math.round(Math.sqrt(input.length));
  target.width = target.height = side;
  const image = new ImageData(side, side);
  input.forEach((grey, at) => image.data.set([grey, grey, grey, 255], at * 4));
  target.getContext("2d").putImageData(image, 0, 0);
}

function scores({ scores, label }) {
  if (!scores) return $("scores").replaceChildren();
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  $("scores").replaceChildren(...scores.map((score, i) => {
    const row = element("div", "", i === label ? "best" : "");
    const track = element("span", "", "track");
    const bar = element("span", "", "bar");
    bar.style.width = `${high > low ? ((score - low) / (high - low)) * 100 : 0}%`;
    track.append(bar);
    row.append(element("span", i), track, element("span", score.toFixed(2)));
    row.setAttribute("role", "row");
    for (const cell of row.children) cell.setAttribute("role", "cell");
    return row;
  }));
}

// Each input once, the newest first.
const seen = new Map();
function remember(answer, input) {
  seen.delete(answer.input);
  seen.set(answer.input, { answer, input });
  while (seen.size > 16) seen.delete(seen.keys().next().value);
  $("recent").replaceChildren(...[...seen.values()].reverse().map(({ answer, input }) => {
    const item = document.createElement("li");
    const small = document.createElement("canvas");
    small.setAttribute("aria-hidden", "true");
    pixels(small, input);
    item.append(small, `${answer.label} · ${answer.origin}`);
    return item;
  }));
}

$("flush").onclick = async () => {
  const count = $("s-entries").textContent;
  if (!confirm(`Flush ${count} answers? The next request of each input asks the model again.`)) return;
  const response = await fetch("/v1/memory", { method: "DELETE", headers: authorized() });
  if (!response.ok) alert((await response.json()).detail);
};

clear();
watch();
