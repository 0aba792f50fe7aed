// The template browser lists an extension's templates in the order of its folder, which is none on
// most disks: what runs without a download comes first.
import { api } from "../../../scripts/api.js";

const folder = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-3) ?? "");
const { getWorkflowTemplates } = api;

api.getWorkflowTemplates = async function () {
  const found = await getWorkflowTemplates.apply(this, arguments);
  found?.[folder]?.sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
  return found;
};

/** @param {string} name of a template */
function rank(name) {
  if (name.startsWith("try-it")) return 0;
  return name.endsWith("-demo-model") ? 1 : 2;
}
