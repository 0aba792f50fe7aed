// A small drawing of where a condition's tokens lie beside the picture's.
import { numbers } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const BLUE = "#4f9dde";
const WIDTH = 240;
const HEIGHT = 88;
const MAX_CELLS = 64; // along a side, of a map that may come from anybody's file

/**
 * The drawing, or null where there is nothing to draw.
 * @param {import("./words.js").Figures} figures
 * @returns {SVGSVGElement | null}
 */
export function mapOf({ kind, picture, box, kept, active }) {
  const [rows, columns] = numbers(picture);
  const [top, left, height, width] = numbers(box);
  if (active === false || !(Math.min(rows, columns, height, width) > 0)) return null;
  const y = Math.min(0, top);
  const x = Math.min(0, left);
  const h = Math.max(rows, top + height) - y;
  const w = Math.max(columns, left + width) - x;
  const scale = Math.min(WIDTH / w, HEIGHT / h);
  const svg = /** @type {SVGSVGElement} */ (element("svg", {
    width: w * scale + 2,
    height: h * scale + 2,
    viewBox: `-1 -1 ${w * scale + 2} ${h * scale + 2}`,
    role: "img",
    "aria-label":
      kind === "spot"
        ? "what was edited of the picture"
        : "where the condition lies beside the picture",
  }));
  svg.style.cssText = "display: block; margin: 4px auto 0;";
  /** @type {(row: number, column: number, height: number, width: number) => object} */
  const rectangle = (row, column, high, wide) => ({
    x: (column - x) * scale,
    y: (row - y) * scale,
    width: wide * scale,
    height: high * scale,
  });
  const words = element("title", {});
  words.textContent = `blue: ${kind === "spot" ? "edited" : "the condition"}; framed: the picture`;
  const frame = rectangle(0, 0, rows, columns);
  const area = rectangle(top, left, height, width);
  const pruned = Array.isArray(kept);
  svg.append(
    words,
    element("rect", { ...frame, fill: "currentColor", "fill-opacity": 0.12 }),
    element("rect", { ...area, fill: BLUE, "fill-opacity": pruned ? 0.15 : 0.5, stroke: BLUE }),
  );
  if (pruned) svg.append(cells(kept, area));
  svg.append(element("rect", { ...frame, fill: "none", stroke: "currentColor" }));
  return svg;
}

/**
 * The tokens that take part, as one path.
 * @param {string[]} kept
 * @param {{x: number, y: number, width: number, height: number}} area
 */
function cells(kept, area) {
  const lines = kept.slice(0, MAX_CELLS).map((line) => String(line).slice(0, MAX_CELLS));
  const high = area.height / lines.length;
  let d = "";
  lines.forEach((line, row) => {
    const wide = area.width / line.length;
    [...line].forEach((cell, column) => {
      if (cell !== "1") return;
      d += `M${area.x + column * wide} ${area.y + row * high}h${wide}v${high}h${-wide}z`;
    });
  });
  return element("path", { d, fill: BLUE, "fill-opacity": 0.75 });
}

/**
 * @param {string} name
 * @param {Record<string, string | number>} attributes
 */
function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}
