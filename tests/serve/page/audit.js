// Run inside the page: what is wrong for readers who cannot see well or use no mouse. Returns sentences; none is good.
() => {
  const problems = [];
  const visible = (element) =>
    element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true }) && !element.closest(".unseen");
  const name = (element) =>
    `${element.tagName.toLowerCase()}.${element.className.baseVal ?? element.className} “${element.textContent.trim().slice(0, 40)}”`;

  // ---------------------------------------------------------------- contrast, as WCAG 2.2 computes it

  const parse = (text) => {
    const found = /^rgba?\(([^)]+)\)$/.exec(text);
    if (!found) throw new Error(`colour ${text}`);
    const [r, g, b, a = 1] = found[1].split(/[\s,/]+/).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const background = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reduceRight((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const luminance = (color) => {
    const [r, g, b] = color
      .slice(0, 3)
      .map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const demand = (element, color, least, what) => {
    const below = background(element);
    const got = ratio(over(parse(color), below), below);
    if (got < least) problems.push(`${what} of ${name(element)}: contrast ${got.toFixed(2)}, and ${least} is needed`);
  };

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (
      seen.has(element) ||
      !walker.currentNode.data.trim() ||
      ["SCRIPT", "NOSCRIPT", "OPTION", "OPTGROUP"].includes(element.tagName)
    )
      continue;
    seen.add(element);
    if (!visible(element) || element.closest(":disabled, [aria-disabled=true]")) continue;
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    demand(element, element instanceof SVGElement ? style.fill : style.color, large ? 3 : 4.5, "text");
  }
  for (const element of document.querySelectorAll(
    "input:not([type=radio], [type=checkbox], .unseen), select, textarea",
  )) {
    if (!visible(element)) continue;
    const style = getComputedStyle(element);
    demand(element.parentElement, style.borderTopColor, 3, "border");
    demand(element, style.color, 4.5, "text");
    if (element.placeholder) demand(element, getComputedStyle(element, "::placeholder").color, 4.5, "placeholder");
  }
  for (const element of document.querySelectorAll("figure path.curve:not(.faint), figure path.points")) {
    if (visible(element)) demand(element.closest("figure"), getComputedStyle(element).stroke, 3, "curve");
  }

  // ---------------------------------------------------------------- structure

  const headings = [...document.querySelectorAll("h1, h2, h3")].filter((element) => element.checkVisibility());
  const ones = headings.filter((element) => element.tagName === "H1");
  if (ones.length !== 1) problems.push(`${ones.length} main headings`);
  headings.reduce((before, element) => {
    const level = Number(element.tagName[1]);
    if (level > before + 1) problems.push(`heading ${name(element)} skips a level`);
    return level;
  }, 0);
  for (const landmark of ["header", "nav", "main", "footer"])
    if (!document.querySelector(landmark)) problems.push(`no ${landmark}`);
  if (!document.documentElement.lang) problems.push("no language");
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of new Set(ids.filter((id, index) => ids.indexOf(id) !== index)))
    problems.push(`id ${id} stands twice`);
  for (const element of document.querySelectorAll("[aria-describedby], [aria-labelledby]")) {
    for (const id of `${element.getAttribute("aria-describedby") ?? ""} ${element.getAttribute("aria-labelledby") ?? ""}`
      .split(" ")
      .filter(Boolean)) {
      if (!document.getElementById(id)) problems.push(`${name(element)} points to ${id}, which is not there`);
    }
  }

  // ---------------------------------------------------------------- size

  for (const element of document.querySelectorAll("button, .button, nav a, input, select, textarea, summary")) {
    if (!visible(element)) continue;
    const box = (element.closest("label") ?? element).getBoundingClientRect();
    if (box.width < 24 || box.height < 24)
      problems.push(
        `${name(element)} is ${box.width.toFixed(0)} by ${box.height.toFixed(0)} pixels, and 24 is the least`,
      );
  }
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (wide > 0) problems.push(`the page is ${wide} pixels wider than the window`);
  return problems;
};
