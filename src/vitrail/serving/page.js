// Pictures are asked about one after the other: the server makes batches of what many people ask.
const at = (id) => document.getElementById(id);
const [files, drop, status, results, select] = ["files", "drop", "status", "results", "model"].map(at);
const ATTEMPTS = 5;
let models = [];
let token = "";
let queue = Promise.resolve();
let open = 0;

async function ask(path, options = {}) {
  const headers = { ...(options.headers ?? {}), ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  for (let attempt = 1; ; attempt++) {
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 503 || attempt === ATTEMPTS) return answer;
    const seconds = Number(answer.headers.get("Retry-After") ?? 2);
    say(`The server is busy; asking again in ${seconds} s.`);
    await new Promise((done) => setTimeout(done, 1000 * seconds));
  }
}

async function reason(answer) {
  try {
    return (await answer.json()).detail;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

function say(text) {
  status.textContent = text;
}

async function begin() {
  try {
    const answer = await ask("v1/models");
    at("access").hidden = answer.status !== 401;
    drop.hidden = !answer.ok;
    if (answer.status === 401) {
      say(token ? "This token is not known." : "");
      at("token").focus();
      return;
    }
    if (!answer.ok) throw new Error(await reason(answer));
    ({ models } = await answer.json());
    select.replaceChildren(...models.map((model) => new Option(model.name, model.name)));
    at("choice").hidden = models.length < 2;
    tell();
    say("");
  } catch (problem) {
    say(problem.message === "Failed to fetch" ? "The server cannot be reached." : problem.message);
  }
}

function tell() {
  const { name, classes, kind } = models[select.selectedIndex];
  at("lead").textContent = `${name} (${kind}) knows ${classes.toLocaleString("en")} classes, and shows where it looked.`;
}

function take(pictures) {
  for (const picture of pictures) {
    const card = at("card").content.cloneNode(true).firstElementChild;
    const name = picture.name || "pasted picture";
    const image = card.querySelector(".came img");
    card.querySelector("bdi").textContent = name;
    image.alt = name;
    image.src = URL.createObjectURL(picture);
    image.onload = () => URL.revokeObjectURL(image.src);
    image.onerror = () => image.closest("figure").remove(); // TIFF, which browsers do not show
    results.prepend(card);
    const model = models[select.selectedIndex];
    open += 1;
    queue = queue.then(() => look(card, picture, name, model)).then(() => (open -= 1));
  }
}

async function look(card, picture, name, model) {
  say(`Looking at ${name}${open > 1 ? `; ${open - 1} more wait` : ""} ...`);
  card.setAttribute("aria-busy", "true");
  try {
    const answer = await ask(`v1/models/${encodeURIComponent(model.name)}/explain?top=5`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: picture,
    });
    if (!answer.ok) throw new Error(await reason(answer));
    const found = await answer.json();
    show(card, name, found, model);
    const [best] = found.labels;
    say(`${name}: ${best.label}, ${percent(best.probability)}.`);
  } catch (problem) {
    const text = problem instanceof TypeError ? "The server cannot be reached, or it refused a body of this size." : problem.message;
    const place = card.querySelector(".bad");
    place.textContent = text;
    place.hidden = false;
    say(`${name}: ${text}`);
  } finally {
    card.removeAttribute("aria-busy");
  }
}

function show(card, name, found, model) {
  const { seen, map, title, caption, explained } = found.explanation;
  picture(card.querySelector(".seen"), seen, `${name} as the model saw it`, `Resized to ${model.image_size.join(" x ")} pixels.`);
  picture(card.querySelector(".map"), map, `Where the model looked in ${name}`, `${title}. ${caption}`);
  const answer = card.querySelector(".answer");
  answer.querySelector("tbody").replaceChildren(...found.labels.map(row));
  answer.querySelector(".note").textContent = `The map is for: ${explained}. It tells what the answer was made of, not whether it is right.`;
  answer.hidden = false;
  at("ramp").hidden = false;
}

function picture(figure, source, alt, caption) {
  const image = figure.querySelector("img");
  image.onload = () => image.classList.toggle("crisp", Math.min(image.naturalWidth, image.naturalHeight) < 64);
  image.alt = alt;
  image.src = source;
  figure.querySelector("figcaption").textContent = caption;
  figure.hidden = false;
}

function row({ label, probability }) {
  const line = document.createElement("tr");
  const name = Object.assign(document.createElement("th"), { scope: "row" });
  name.append(Object.assign(document.createElement("bdi"), { textContent: label }));
  const share = Object.assign(document.createElement("td"), { className: "number", textContent: percent(probability) });
  const bar = Object.assign(document.createElement("td"), { className: "bar" });
  const length = document.createElement("div");
  length.style.width = percent(probability);
  bar.append(length);
  line.append(name, share, bar);
  return line;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

files.addEventListener("change", () => {
  take(files.files);
  files.value = ""; // so that the same picture can be chosen again
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && !drop.hidden) take(event.dataTransfer.files);
  });
document.addEventListener("paste", (event) => {
  if (!drop.hidden) take(event.clipboardData.files);
});
select.addEventListener("change", tell);
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  begin();
});
begin();
