// Which workflow a run belongs to, and what its nodes show in every state that undo can bring back.
//
// Figures are not a change that the person made: they must not become a step of undo, mark the
// workflow as modified, or make the queue's "run on change" run again. So they are written into the
// states that the editor compares and restores, beside the node that is on the screen.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { showOn, showOnSaved } from "./panel.js";

const SETTLED = 400; // ms after which Nodes 2.0 has measured a node that grew
const REMEMBERED = 100;
const LOADING = 5000; // ms that the editor takes at most to put a graph on the screen
const OPENING = 2000; // ms after that in which the graph's workflow becomes the active one, if it isn't

/** @type {Map<string, any>} prompt id -> the workflow that was open when it was queued */
const workflows = new Map();

// The graph on the screen may be another workflow's than the active one while it is being loaded.
let activeBefore = null;
let loadedBy = 0;

/** Before the editor puts another graph on the screen. */
export function graphIsLoading() {
  activeBefore = active();
  loadedBy = performance.now() + LOADING;
}

/** After the editor has put another graph on the screen; undo puts one of the same workflow there. */
export function graphIsLoaded() {
  loadedBy = performance.now() + OPENING;
}

function isLoading() {
  return performance.now() < loadedBy && active() === activeBefore;
}

/** Begins to remember which workflow each prompt is from. */
export function followQueue() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (...given) {
    const workflow = active();
    const answer = await queuePrompt.apply(this, given);
    if (answer?.prompt_id) workflows.set(answer.prompt_id, workflow);
    if (workflows.size > REMEMBERED) workflows.delete(workflows.keys().next().value);
    return answer;
  };
}

/**
 * Shows something on a node of the workflow that a prompt is from.
 * @param {string} prompt
 * @param {string | number} id as the host executes it: "12:3" is node 3 in subgraph 12
 * @param {import("./panel.js").Shown} change
 */
export function showInRun(prompt, id, change) {
  show(workflowOf(prompt), String(id).split(":"), change);
}

/**
 * @param {any} workflow
 * @param {string[]} path
 * @param {import("./panel.js").Shown} change
 */
function show(workflow, path, change) {
  if (isLoading()) {
    setTimeout(() => show(workflow, path, change), 50);
    return;
  }
  const node = workflow === active() ? find(app.graph, path) : null;
  if (node) showOn(node, change);
  const keep = () => {
    for (const state of states(workflow)) {
      const saved = findSaved(state, path);
      if (!saved) continue;
      showOnSaved(saved, change);
      if (!node) continue;
      const now = [node.size[0], node.size[1]];
      const isOpen = state === workflow.changeTracker.activeState;
      saved.size = isOpen ? now : now.map((size, i) => Math.max(saved.size?.[i] ?? 0, size));
    }
    persist(workflow);
  };
  keep();
  if (node) setTimeout(keep, SETTLED);
}

/** The workflow that is open. */
export function active() {
  return app.extensionManager?.workflow?.activeWorkflow ?? null;
}

/**
 * The workflow that a prompt is from.
 * @param {string} prompt
 */
export function workflowOf(prompt) {
  return workflows.get(prompt) ?? active();
}

/**
 * @param {any} graph
 * @param {string[]} path
 */
export function find(graph, path) {
  for (const id of path.slice(0, -1)) graph = graph?.getNodeById(id)?.subgraph;
  return graph?.getNodeById(path.at(-1)) ?? null;
}

/**
 * @param {any} state a saved graph
 * @param {string[]} path
 */
function findSaved(state, path) {
  let nodes = state.nodes;
  for (const id of path.slice(0, -1)) {
    const type = nodes?.find((n) => String(n.id) === id)?.type;
    nodes = state.definitions?.subgraphs?.find((s) => s.id === type)?.nodes;
  }
  return nodes?.find((n) => String(n.id) === path.at(-1)) ?? null;
}

/** @param {any} workflow */
function states(workflow) {
  const { initialState, activeState, undoQueue, redoQueue } = workflow?.changeTracker ?? {};
  const all = [initialState, activeState, ...(undoQueue ?? []), ...(redoQueue ?? [])];
  return new Set(all.filter(Boolean));
}

/**
 * Has the editor store its draft, so that a reload of the page keeps the figures.
 * @param {any} workflow
 */
function persist(workflow) {
  const state = workflow?.changeTracker?.activeState;
  if (!state || workflow !== active()) return;
  // "Run on change" listens to the same event, and would never stop running.
  const modes = [app.extensionManager.queueSettings?.mode, app.ui?.autoQueueMode];
  if (modes.includes("change")) return;
  api.dispatchCustomEvent?.("graphChanged", state);
}
