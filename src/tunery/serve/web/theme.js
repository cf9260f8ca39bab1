// A plain script that runs before the first paint, so that a chosen theme does not flash the other one first.
try {
  const chosen = localStorage.getItem("tunery.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage can be switched off: then the system's theme it is
}
