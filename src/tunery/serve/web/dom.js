// Elements made from code. Whatever comes from the server or a file goes in as text; nothing is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

// Properties rather than attributes: their attribute only sets the initial value.
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "htmlFor", "textContent", "indeterminate"]);

function fill(element, props, children) {
  // children first: a select takes its value only once it has the option
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  return element;
}

/** An HTML element: `h("button", {class: "quiet", click: start}, "Start")`. A function listens to that event. */
export function h(name, props, ...children) {
  return fill(document.createElement(name), props, children);
}

/** The same for SVG. */
export function s(name, props, ...children) {
  return fill(document.createElementNS(SVG, name), props, children);
}

/** Set a node's text, and leave it alone when it says so already: a selection and a screen reader's place survive. */
export function setText(node, text) {
  const next = String(text);
  if (node.textContent !== next) node.textContent = next;
}

export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/**
 * Make the children of `parent` match `items`, keeping the node of every item that stays: focus and scroll stay too.
 * @param keyOf item → text that names it; @param make item → node; @param update (node, item), of new nodes too
 */
export function reconcile(parent, items, keyOf, make, update = () => {}) {
  const wanted = new Set(items.map(keyOf));
  const nodes = new Map();
  for (const node of [...parent.children]) {
    if (wanted.has(node.dataset.key)) nodes.set(node.dataset.key, node);
    else node.remove();
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let node = nodes.get(key);
    if (!node) {
      node = make(item);
      node.dataset.key = key;
    }
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
}

/** Say something to a screen reader, when it has a moment. Lines are added, so that two said at once are both read. */
export function announce(text) {
  const line = h("p", {}, text);
  document.getElementById("live").append(line);
  setTimeout(() => line.remove(), 10_000);
}

let count = 0;

/** An id for a label or a description to point to. */
export function freshId(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

/** A button that copies `text` and says so. */
export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", class: "quiet", click: copy }, label);
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed"; // no clipboard on a plain http address other than this machine
    }
    setTimeout(() => (button.textContent = label), 1600);
  }
  return button;
}

/** A message about something that went wrong, with an optional button. */
export function problemBox(title, detail, action) {
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("h2", {}, title),
    detail && h("p", { class: "text" }, detail),
    action,
  );
}
