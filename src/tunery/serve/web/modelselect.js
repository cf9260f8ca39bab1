// Models as the options of a select: bases, aliases, fine-tuned ones, checkpoints.

import { h } from "./dom.js";
import { shortModel } from "./format.js";

const GROUPS = [
  ["base", "Base models"],
  ["alias", "Aliases"],
  ["fine-tuned", "Fine-tuned models"],
  ["checkpoint", "Checkpoints"],
];

/** @param models [{id, kind, base}] as /api/models gives them, and checkpoints */
export function modelOptions(models) {
  return GROUPS.map(([kind, label]) => {
    const members = models.filter((model) => model.kind === kind);
    return (
      members.length > 0 &&
      h(
        "optgroup",
        { label },
        members.map((model) => h("option", { value: model.id, title: model.id }, optionText(model))),
      )
    );
  }).filter(Boolean);
}

function optionText({ id, kind, base }) {
  return kind === "alias" ? `${id} (${base})` : shortModel(id);
}
