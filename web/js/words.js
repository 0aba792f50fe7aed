// Figures of a run, put into words. What comes in may be from anybody's workflow file.

/**
 * What a node shows of a run, as omini2_core/host/figures.py makes it.
 * @typedef {Object} Figures
 * @property {"condition"|"cache"|"compact"|"saved"|"spot"|"training"} kind
 * @property {number} [tokens] those that take part
 * @property {number} [of] all of the condition's
 * @property {string} [attention]
 * @property {boolean} [active] whether the condition took part at all
 * @property {number[]} [picture] rows and columns of the picture
 * @property {number[]} [box] row, column, height and width of the condition beside the picture
 * @property {string[]} [kept] its tokens, a row each, "0" where they were dropped
 * @property {number} [before]
 * @property {number} [computed]
 * @property {number} [reused]
 * @property {number} [steps]
 * @property {number} [kv_bytes]
 * @property {string} [storage]
 * @property {string} [place]
 * @property {number} [saved] a share
 * @property {References} [references]
 * @property {number[]} [shares] of the model's rows, computed at each of the sampler's calls
 * @property {"encode"|"train"|"done"} [stage]
 * @property {number} [step]
 * @property {number} [from] the step that a run went on from
 * @property {number} [left] seconds
 * @property {number} [start] the loss at first
 * @property {number} [loss] now
 * @property {number[]} [size] width and height in pixels
 * @property {string} [optimizer]
 * @property {number} [rate]
 * @property {number} [seed]
 * @property {number} [asked] the seed that the node has
 */

/**
 * What a run did with an editing model's references.
 * @typedef {Object} References
 * @property {number} [beside] how many conditions there were
 * @property {string} [attention]
 * @property {number} [count]
 * @property {number} [tokens]
 * @property {number} [saved] a share
 * @property {number|null} [drift] from the K/V that were replaced, relative to these
 */

/** @type {Record<string, (figures: Figures) => string[]>} */
const LINES = {
  condition: (f) =>
    f.active
      ? [`${tokens(f)}, ${f.attention === "independent" ? "independent" : "joint"}`, place(f)]
      : ["took no part: condition_scale is 0 or no token is left"],
  saved: (f) => [`${number(f.tokens)} tokens, from a file`],
  cache: (f) => [
    computed(f),
    `K/V ${bytes(f.kv_bytes)} on ${f.place === "cpu" ? "cpu" : "gpu"}, ` +
      `${f.storage === "fp8" ? "fp8" : "the model's format"}`,
    f.references && !number(f.references.beside)
      ? ""
      : `${percent(f.saved)} of the condition work saved`,
    ...(f.references ? references(f.references) : []),
  ],
  spot: (f) => [
    `${number(f.tokens)} of ${number(f.of)} tokens edited`,
    `${percent(f.saved)} of the model's rows saved`,
    shares(numbers(f.shares)),
    f.kv_bytes ? `K/V ${bytes(f.kv_bytes)} on ${f.place === "cpu" ? "cpu" : "gpu"}` : "",
  ],
  training: (f) => [
    stage(f),
    f.loss ? `loss ${number(f.start).toFixed(3)} → ${number(f.loss).toFixed(3)}` : "",
    `${numbers(f.size).join("x")}, ${f.optimizer === "adamw" ? `adamw ${number(f.rate)}` : "prodigy"}`,
    f.seed === f.asked ? "" : `goes on with its own seed, ${number(f.seed)}`,
  ],
  compact: (f) => [
    `${number(f.before)} → ${number(f.tokens)} tokens`,
    `K/V on FLUX.1: ${bytes(f.kv_bytes)}`,
    `${percent(1 - number(f.tokens) / Math.max(1, number(f.before)))} of the tokens saved`,
  ],
};

/**
 * A line each.
 * @param {Figures} figures
 * @returns {string[]}
 */
export function linesOf(figures) {
  return LINES[figures?.kind]?.(figures).filter(Boolean) ?? [];
}

/**
 * @param {unknown} value
 * @returns {number}
 */
export function number(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : 0;
}

/**
 * @param {unknown} values
 * @returns {number[]}
 */
export function numbers(values) {
  return Array.isArray(values) ? values.map(number) : [];
}

/** @param {Figures} f */
function tokens(f) {
  const all = number(f.of);
  return number(f.tokens) < all ? `${number(f.tokens)} of ${all} tokens` : `${all} tokens`;
}

/** @param {Figures} f */
function stage(f) {
  if (f.stage === "encode") return `reading picture ${number(f.step)}`;
  const gone = number(f.from) ? `, went on from ${number(f.from)}` : "";
  if (f.stage === "done") return `${number(f.step)} steps trained${gone}`;
  return `step ${number(f.step)} of ${number(f.steps)}, ${duration(f.left)} left`;
}

/** @param {unknown} seconds */
function duration(seconds) {
  const minutes = number(seconds) / 60;
  if (minutes < 1) return `${Math.max(1, Math.round(number(seconds)))} s`;
  return minutes < 90 ? `${Math.round(minutes)} min` : `${(minutes / 60).toFixed(1)} h`;
}

/** @param {Figures} f */
function computed(f) {
  const times = number(f.computed);
  const steps = `${number(f.steps)} ${number(f.steps) === 1 ? "step" : "steps"}`;
  if (times === 0 && number(f.reused)) return `reused from an earlier run, for ${steps}`;
  return `computed ${times === 1 ? "once" : `${times} times`} in ${steps}`;
}

/**
 * What each call computed, in runs of the same share.
 * @param {number[]} all
 */
function shares(all) {
  /** @type {[string, number][]} */
  const runs = [];
  for (const share of all) {
    const last = runs.at(-1);
    if (last?.[0] === percent(share)) last[1] += 1;
    else runs.push([percent(share), 1]);
  }
  const words = runs.map(([share, times]) => (times > 1 ? `${share} x${times}` : share));
  return words.length ? `computed: ${words.join(", ")}` : "";
}

/** @param {References} r */
function references(r) {
  const many = number(r.count) === 1 ? "1 reference" : `${number(r.count)} references`;
  const drift = number(r.drift);
  return [
    `${many}, ${number(r.tokens)} tokens, ${r.attention === "isolated" ? "isolated" : "joint"}`,
    `${percent(r.saved)} of their work saved`,
    drift ? `K/V moved by ${(100 * drift).toFixed(drift < 0.1 ? 1 : 0)} % between refreshes` : "",
  ];
}

/** @param {Figures} f */
function place(f) {
  const [rows, columns] = numbers(f.picture);
  const [top, left, height, width] = numbers(f.box);
  if (width === undefined) return "";
  if (top === 0 && left === 0 && height === rows && width === columns) return "over the picture";
  /** @type {(from: number, size: number) => string} */
  const span = (from, size) => `${short(from)} to ${short(from + size)}`;
  return `rows ${span(top, height)}, columns ${span(left, width)}`;
}

/** @param {number} value */
function short(value) {
  return String(Math.round(value * 10) / 10);
}

/** @param {unknown} value */
function bytes(value) {
  const megabytes = number(value) / 1e6;
  return `${megabytes < 10 ? megabytes.toFixed(1) : megabytes.toFixed(0)} MB`;
}

/** @param {unknown} share */
function percent(share) {
  return `${Math.round(100 * number(share))} %`;
}
