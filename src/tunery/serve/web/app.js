// The frame: which view the address names, the theme, whether the server answers, the key.

import { api, key } from "./api.js";
import * as chat from "./chat.js";
import { connection, tryNow } from "./connection.js";
import { h, setText } from "./dom.js";
import * as job from "./job.js";
import * as jobs from "./jobs.js";
import * as models from "./models.js";
import * as newJob from "./newjob.js";
import { askForKey, scriptHint } from "./parts.js";

const main = document.getElementById("main");
let current = null; // AbortController of the view that is shown: it ends its polling and its streams

// -------------------------------------------------------------------------- views

const VIEWS = { jobs, new: newJob, chat, models };

function route() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, id] = path.split("/").map(decodeURIComponent);
  if (!(page in VIEWS)) {
    location.replace("#/jobs");
    return;
  }
  const view = page === "jobs" && id ? job : VIEWS[page];
  const first = current === null;
  current?.abort();
  current = new AbortController();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.page = page;
  const setTitle = (text) => (document.title = `${text} · tunery`);
  setTitle(view.title);
  main.replaceChildren();
  scrollTo(0, 0);
  view.show(main, { id, query: new URLSearchParams(search), signal: current.signal, setTitle });
  // A new view is like a new page: the keyboard starts at its top. Not on load, where the browser does that.
  if (!first) (main.querySelector("h1") ?? main).focus({ preventScroll: true });
}

addEventListener("hashchange", route);

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view, so the link must not change it
  main.focus();
});

// -------------------------------------------------------------------------- theme

const button = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : system.matches;
}

const showTheme = () => button.setAttribute("aria-pressed", String(isDark()));

button.addEventListener("click", () => {
  const wanted = isDark() ? "light" : "dark";
  // Back to what the system says: follow it again from here on.
  const follows = (wanted === "dark") === system.matches;
  if (follows) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = wanted;
  try {
    if (follows) localStorage.removeItem("tunery.theme");
    else localStorage.setItem("tunery.theme", wanted);
  } catch {
    // storage is switched off: the choice lasts until the page is left
  }
  showTheme();
});
system.addEventListener("change", showTheme);
showTheme();

// -------------------------------------------------------------------------- server

const banner = document.getElementById("banner");
let countdown = 0;

connection.addEventListener("down", ({ detail }) => {
  let left = detail;
  clearInterval(countdown);
  // the seconds stand apart: a screen reader is told once, not each second
  const tell = () => setText(document.getElementById("banner-wait"), left > 0 ? `in ${left} s` : "now");
  tell();
  countdown = setInterval(() => ((left -= 1), tell()), 1000);
  banner.hidden = false;
  setText(document.getElementById("banner-text"), "The server is not reachable. Trying again");
});
connection.addEventListener("up", () => {
  clearInterval(countdown);
  banner.hidden = true;
  setText(document.getElementById("banner-text"), "");
  showFooter();
});
document.getElementById("banner-try").addEventListener("click", tryNow);

connection.addEventListener("key", async ({ detail }) => {
  // "up" wakes whatever waits; a wrong key brings us back here
  if (await askForKey(detail)) connection.dispatchEvent(new Event("up"));
});

async function showFooter() {
  const server = await api.server().catch(() => null);
  if (!server) return; // "up" comes back here
  const forget = h(
    "button",
    { type: "button", class: "quiet", click: () => (key.set(""), location.reload()) },
    "Forget the key",
  );
  document
    .getElementById("bottom")
    .replaceChildren(
      h(
        "details",
        {},
        h("summary", {}, "Use it from a script"),
        h("p", {}, "Scripts written for OpenAI's API run against this server when they are pointed here:"),
        scriptHint(),
      ),
      h("p", { class: "note" }, `tunery ${server.version}`, server.needs_key && key.get() && forget),
    );
}

route();
showFooter();
